"""The kinds of network that kdctl does not handle, told by their layers before any weight is read."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdctl.base.errors import ModelError
from kdctl.model.attention import check_attention

EXPERT_PARTS = {"experts", "router", "expert"}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
STATEFUL_LAYERS = {"linear_attention", "recurrent", "mamba", "mamba2", "conv", "ssm"}


def check_architecture(model: PreTrainedModel) -> None:
    """Raise ModelError for mixtures of experts, layers with a state, a shared cache or another form than nn.Linear."""
    kind = f"model type {model.config.model_type!r}"
    names = dict(model.named_modules())
    experts = [name for name in names if EXPERT_PARTS & set(name.split("."))]
    deep = [name for name, parameter in model.named_parameters() if parameter.dim() > 2]
    if experts or (deep and any(getattr(model.config, count, None) for count in EXPERT_COUNTS)):
        raise ModelError(
            f"{kind} is a mixture of experts ({(experts or deep)[0]}): a router chooses the weights that a token "
            "meets, and kdctl neither quantizes expert tensors nor keeps its choices; use a dense model"
        )
    if has_state(model):
        raise ModelError(
            f"{kind} is a recurrent network: some of its layers carry a state from token to token (state space, linear "
            "attention or convolution), and kdctl lays sequences end to end, where the state of one would leak into "
            "the next; use a network of attention layers only"
        )
    shared = [name for name, module in names.items() if getattr(module, "is_kv_shared_layer", False)]
    if shared:
        raise ModelError(
            f"{kind}: its layers share caches ({shared[0]} reads the keys and values of a layer before it), and kdctl "
            "continues sequences from a cache that every layer fills itself; use a network without shared layers"
        )
    for name, module in names.items():
        if isinstance(module, Conv1D):
            raise ModelError(
                f"{kind} keeps its linear layers as Conv1D with transposed weights ({name}), which the pack-quantized "
                "format does not describe; kdctl quantizes nn.Linear only"
            )
    if deep:
        raise ModelError(
            f"{kind} has weights of more than two dimensions ({deep[0]}), so not all that it multiplies by is a linear "
            "layer, and kdctl quantizes nn.Linear only"
        )
    check_attention(model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers that a network has one after the other. Raises ModelError where it has none such."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"model type {model.config.model_type!r} has no list of its {count} decoder layers")


def has_state(model: PreTrainedModel) -> bool:
    """Tell whether layers of a network carry a state from token to token beside keys and values."""
    kinds = getattr(model.config, "layer_types", None) or ()
    short = any(isinstance(module, nn.Conv1d) for module in model.modules())
    return bool(getattr(model, "_is_stateful", False)) or short or not STATEFUL_LAYERS.isdisjoint(map(str, kinds))

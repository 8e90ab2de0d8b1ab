#!/usr/bin/env bash
# All that kdctl measures on one GPU, what matters most first, so that ten minutes give most of it.
#
#     PYTHON=python3 bash benchmarks/gpu.sh [FOLDER]
#
# FOLDER (build/gpu) gets one text file a measurement; what fails says so and the rest goes on. The network is one of
# random weights in the shape of Qwen3-4B, so that nothing is to be loaded. SMALL=1 runs it all on a tiny shape, with
# which a CPU can try the script.
set -u
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export PYTHONPATH=$PWD

if [ -n "${SMALL:-}" ]; then
    shape=(--hidden 256 --layers 2 --intermediate 512 --heads 4 --vocabulary 50000)
    tokens=(--sequences 2 --tokens 64 --rounds 3)
    written=(--prompts 4 --tokens 8 --rounds 1)
else
    shape=(--hidden 2560 --layers 36 --intermediate 9728 --heads 32 --vocabulary 151936)
    tokens=(--sequences 8 --tokens 1024 --rounds 6)
    written=(--prompts 64 --tokens 256 --rounds 2)
fi

failed=0
measure() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name: $*"
    local started=$SECONDS
    if timeout 240 "$@" > "$out/$name.txt" 2> "$out/$name.err"; then
        cat "$out/$name.txt"
    else
        echo "failed, see $out/$name.err"
        tail -5 "$out/$name.err"
        failed=1
    fi
    echo "($((SECONDS - started)) s)"
}

measure machine "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
measure tests "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py
measure lora "$python" benchmarks/step_parts.py --train lora "${tokens[@]}" "${shape[@]}"
measure weights "$python" benchmarks/step_parts.py --train weights "${tokens[@]}" "${shape[@]}"
measure generation "$python" benchmarks/generation.py "${written[@]}" "${shape[@]}"
exit $failed

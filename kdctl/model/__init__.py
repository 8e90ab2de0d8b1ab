"""One network: from a reference to weights, and one forward pass."""

from kdctl.system.patches import convert_without_pandas, import_caches_without_hqq

import_caches_without_hqq()
convert_without_pandas()

"""One network: from a reference to weights, and one forward pass."""

from kdctl.system.patches import import_caches_without_hqq

import_caches_without_hqq()

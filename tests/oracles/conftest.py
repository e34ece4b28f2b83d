"""torchao logs on import which of its compiled parts did not load; none of them is used here."""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

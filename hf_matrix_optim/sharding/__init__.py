"""What a step needs to know of other ranks; the only place that imports ``torch.distributed``."""

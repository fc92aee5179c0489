"""What runs a step: the protocol (`base`) and its implementations, one file each."""

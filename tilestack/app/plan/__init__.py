"""`tilestack plan`: what a training would hold of the GPUs' memory, and which configurations fit."""

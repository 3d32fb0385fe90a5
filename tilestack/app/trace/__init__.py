"""`tilestack trace`: the design's picture, filled with what a few training steps really ran."""

"""What tests and benchmarks share: the cases of every op, and the rule that decides whether a result is right."""

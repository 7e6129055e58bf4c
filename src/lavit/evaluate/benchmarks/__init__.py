"""The benchmarks of the paper's table, on the field's own folders (`lavit eval --task`)."""

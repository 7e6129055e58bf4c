"""Generation: sampling, the token engine, and the pipeline that people call."""

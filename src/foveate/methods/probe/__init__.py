"""Analysis of models and attacks on them: measured, not applied."""

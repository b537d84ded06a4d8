"""All methods, one paper a file, in a folder for each kind; `baselines.py` is what every method is compared with."""

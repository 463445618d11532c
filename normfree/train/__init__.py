"""Where everything meets: the config, the recipes, the loop, and the run folder."""

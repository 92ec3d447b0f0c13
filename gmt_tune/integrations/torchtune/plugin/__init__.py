"""How `tune` finds our recipes and configs, with which versions of its libraries, and how a recipe is started."""

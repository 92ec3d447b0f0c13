"""torchtune integration: versions that work together, the recipe registry, and parts of the recipes."""

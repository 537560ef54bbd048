"""The smallest host that can run `modules/`: registry, config, base classes, saving, launcher. Importing it costs nothing."""

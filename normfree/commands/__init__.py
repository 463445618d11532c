"""The commands, one file per verb. Each parses arguments, calls the library and prints. torch is imported lazily."""

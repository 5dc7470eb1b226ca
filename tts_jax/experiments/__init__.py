"""The papers' figures: one module per paper, settings as data, data computed once, then drawn."""

"""Language policies: load, quantize, evaluate and generate. Nothing is imported here, so that nothing heavy is."""

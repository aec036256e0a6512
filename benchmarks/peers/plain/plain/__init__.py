"""A federated app as one writes it with Flower and PEFT alone."""

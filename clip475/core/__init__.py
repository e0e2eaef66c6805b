"Configuration, errors, seeds, devices and figures: what every other package uses."

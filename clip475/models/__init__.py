"Image towers, text towers, the joint model, parameter tables and freezing."

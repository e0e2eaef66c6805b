"The loss, one step, one run, large batches, several processes and what training costs."

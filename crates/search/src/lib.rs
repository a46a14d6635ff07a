//! Architecture spaces as values, methods, constraints, and the derive-repair-fine-tune-measure loop over a Trainable.

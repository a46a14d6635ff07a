//! Data sets and loaders: CIFAR, the built-in glyphs, text.

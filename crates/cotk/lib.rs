//! The program: arguments, progress, tables, `--json`, exit codes. Holds no algorithm.

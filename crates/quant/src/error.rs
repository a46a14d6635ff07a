//! What can be wrong with weights, shapes and coded bytes.

/// An input that cannot be coded or read, with where, found and expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantError {
    #[error("matrix of {rows} × {cols}: rows and columns must be 1..={limit}")]
    Shape { rows: usize, cols: usize, limit: usize },
    #[error(
        "group of {found} weights, expected 32, 64, 128 or 16777216 for whole rows; with two-level scales 16, 32, 64 or 128"
    )]
    Group { found: usize },
    #[error("unknown code `{found}`, expected one of {expected}")]
    Code { found: String, expected: &'static str },
    #[error("{found} bits, expected one of 1, 2, 3, 4, 8")]
    Bits { found: u32 },
    #[error("{what}: {found} elements, expected {expected}")]
    Length {
        what: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("weight at row {row}, column {col} is {value}, expected a finite number")]
    NotFinite { row: usize, col: usize, value: f32 },
    #[error(
        "weight of magnitude {absmax} at row {row}, column {col} needs a scale beyond f16 (largest weight: {limit})"
    )]
    ScaleOverflow {
        row: usize,
        col: usize,
        absmax: f32,
        limit: f32,
    },
    #[error("plane {plane} has {found} bytes, expected {expected}")]
    PlaneBytes {
        plane: usize,
        found: usize,
        expected: usize,
    },
    #[error("code {code} has no prefix of {bits} bits, expected one of {expected:?}")]
    NoPrefix {
        code: String,
        bits: u32,
        expected: Vec<u32>,
    },
    #[error("the prefix of {bits} bits needs {expected} planes, found {found}")]
    MissingPlane { bits: u32, found: usize, expected: usize },
    #[error("a pair needs two matrices of one format")]
    PairFormat,
    #[error("{what} of the Hessian is {found}, expected finite numbers, not negative on the diagonal")]
    Hessian { what: &'static str, found: f64 },
    #[error("input of token {token}, column {col} is {value}, expected a finite number")]
    Input { token: usize, col: usize, value: f32 },
    #[error("{what} is {found}, expected a finite number, not negative")]
    Weight { what: String, found: f64 },
    #[error("scale factors {found:?}, expected at least one, each above 0")]
    ScaleFactors { found: Vec<f32> },
    #[error(transparent)]
    Linalg(#[from] cotk_linalg::Error),
    #[error("no choice fits: the least that any allocation needs is {least} {unit}, the budget is {budget}")]
    NothingFits {
        least: f64,
        budget: f64,
        unit: &'static str,
    },
    #[error("item {item} has no candidate")]
    NoCandidate { item: usize },
    #[error("item {item}, candidate {candidate}: {what} is {found}, expected a finite number, not negative")]
    BadCandidate {
        item: usize,
        candidate: usize,
        what: &'static str,
        found: f64,
    },
}

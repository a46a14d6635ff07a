//! SVD and Cholesky on `ndarray` types, and what compression solves with them: whitened low rank, ridge refits, removal
//! of columns. faer by default, LAPACK behind the feature `lapack`. Knows numbers alone, no networks. Law, for every backend: the factors multiply back to the input, `U` and `V` are orthonormal, singular
//! values descend; what has no factorisation is an error that says where.

#![forbid(unsafe_code)]

mod backend;
mod channels;
mod cholesky;
mod error;
#[cfg(test)]
mod laws;
mod ridge;
#[cfg(test)]
mod solvers_laws;
mod svd;
mod triangular;
mod whiten;

pub use self::channels::{Removal, keep_columns, removal_order};
pub use self::cholesky::cholesky;
pub use self::error::Error;
pub use self::ridge::ridge;
pub use self::svd::{Svd, svd};
pub use self::triangular::{invert_lower, invert_symmetric};
pub use self::whiten::{Product, Whitened, break_even, whiten, whiten_product};

//! SVD and Cholesky on `ndarray` types: faer by default, LAPACK behind the feature `lapack`. Knows numbers alone, no
//! networks. Law, for every backend: the factors multiply back to the input, `U` and `V` are orthonormal, singular
//! values descend; what has no factorisation is an error that says where.

#![forbid(unsafe_code)]

mod backend;
mod cholesky;
mod error;
#[cfg(test)]
mod laws;
mod svd;
mod triangular;

pub use self::cholesky::cholesky;
pub use self::error::Error;
pub use self::svd::{Svd, svd};
pub use self::triangular::{invert_lower, invert_symmetric};

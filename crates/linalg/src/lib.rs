//! SVD and Cholesky on ndarray types: faer by default, LAPACK behind the feature lapack.

//! Scales as a format can hold them. Law: what is settled stays as it is when it is settled again.

use half::f16;

use crate::layout::MatrixFormat;

/// Moves the scales of one row to values that `format` holds; false where one is beyond all of them (or not finite).
pub(crate) fn settle_row(format: &MatrixFormat, scales: &mut [f64]) -> bool {
    debug_assert_eq!(scales.len(), format.groups());
    for scale in scales.iter_mut() {
        *scale = f16::from_f64(*scale).to_f64();
    }
    scales.iter().all(|s| s.is_finite())
}

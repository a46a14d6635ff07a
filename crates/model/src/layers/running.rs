//! A softmax that is not over yet: maximum, sum and mix of values so far, to which further keys are added. Law: merged in
//! any cut, it is the softmax over all keys at once (`attention`).

/// Softmax so far of the rows of a job (Milakov and Gimelshein, 2018).
#[derive(Debug, Default)]
pub(super) struct Running {
    /// Largest score so far.
    pub(super) maxima: Vec<f32>,
    /// Σ exp(score − max).
    pub(super) sums: Vec<f32>,
    /// Σ exp(score − max) · value, `[rows, value_dim]`.
    pub(super) mixes: Vec<f32>,
}

impl Running {
    pub(super) fn begin(&mut self, rows: usize, value_dim: usize) {
        for (values, count, start) in [
            (&mut self.maxima, rows, f32::NEG_INFINITY),
            (&mut self.sums, rows, 0.0),
            (&mut self.mixes, rows * value_dim, 0.0),
        ] {
            values.clear();
            values.resize(count, start);
        }
    }
}

/// Adds the softmax over further keys to one over earlier ones: maximum, sum, mix.
pub(super) fn merge((max, sum, mix): (&mut f32, &mut f32, &mut [f32]), (more_max, more_sum, more): (f32, f32, &[f32])) {
    if more_max == f32::NEG_INFINITY {
        return; // the row sees none of them
    }
    let largest = max.max(more_max);
    let (keep, take) = (decay(*max, largest), decay(more_max, largest));
    *max = largest;
    *sum = *sum * keep + more_sum * take;
    for (mix, more) in mix.iter_mut().zip(more) {
        *mix = *mix * keep + more * take;
    }
}

/// exp(before − largest); most often the largest is as it was, and the function is called for nothing.
pub(super) fn decay(before: f32, largest: f32) -> f32 {
    if before == largest {
        1.0
    } else {
        (before - largest).exp()
    }
}

/// What the mixes of the rows are once no key is left: `[rows, value_dim]`.
pub(super) fn divide(mixes: &[f32], sums: &[f32], value_dim: usize, out: &mut [f32]) {
    let rows = out.chunks_exact_mut(value_dim).zip(mixes.chunks_exact(value_dim));
    for ((out, mix), sum) in rows.zip(sums) {
        out.iter_mut().zip(mix).for_each(|(out, mix)| *out = mix / sum);
    }
}

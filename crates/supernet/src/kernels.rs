//! Super-kernels: each smaller kernel is the centre of the larger one. "Single-Path NAS" (Stamoulis et al., 2019).

use tch::{Kind, Tensor};

/// The centre `kernel` x `kernel` taps of `[cout, cin, K, K]`.
pub(crate) fn crop(weights: &Tensor, kernel: u32) -> Tensor {
    let (full, kernel) = (weights.size()[2], i64::from(kernel));
    let from = (full - kernel) / 2;
    weights.narrow(2, from, kernel).narrow(3, from, kernel)
}

/// 1 inside the centre `kernel` x `kernel` taps of a `full` x `full` kernel, 0 outside: `[1, 1, full, full]`.
pub(crate) fn mask(full: u32, kernel: u32) -> Tensor {
    let (full, from) = (i64::from(full), i64::from(full - kernel) / 2);
    let inside = |v: i64| (from..full - from).contains(&v);
    let values: Vec<f32> = (0..full * full)
        .map(|i| if inside(i / full) && inside(i % full) { 1.0 } else { 0.0 })
        .collect();
    Tensor::from_slice(&values).view([1, 1, full, full])
}

/// `sqrt(mean(w²) + 1e-12)` over the taps of a mask: a root mean *square*, because norms grow with the number of taps.
pub(crate) fn rms(weights: &Tensor, mask: &Tensor) -> f64 {
    let taps = mask.sum(Kind::Double).double_value(&[]) * (weights.size()[0] * weights.size()[1]) as f64;
    let squares = (weights.square() * mask).sum(Kind::Double).double_value(&[]);
    (squares / taps + 1e-12).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_large_kernel_convolves_as_its_centre_alone() {
        let x = Tensor::arange(2 * 3 * 8 * 8, (Kind::Float, tch::Device::Cpu))
            .view([2, 3, 8, 8])
            .sin();
        let w = Tensor::arange(4 * 3 * 25, (Kind::Float, tch::Device::Cpu))
            .view([4, 3, 5, 5])
            .cos();
        for stride in [1, 2] {
            let conv = |w: &Tensor, pad: i64| x.conv2d::<&Tensor>(w, None, [stride; 2], [pad; 2], [1; 2], 1);
            let difference = conv(&(&w * mask(5, 3)), 2) - conv(&crop(&w, 3), 1);
            assert!(difference.abs().max().double_value(&[]) < 1e-5, "stride {stride}");
        }
    }
}

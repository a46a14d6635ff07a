//! Experts that are not in memory: how many a token misses, and how long a layer takes when fetches run beside computing.
//! Pure. Law: the time is that of all patterns of misses, each with its probability (not that of the mean number), never
//! falls with a miss more, and is the resident layer's without any.

/// Probabilities of 0, 1, … `probabilities.len()` hits in independent draws (Poisson-binomial), by adding one draw after the
/// other: O(n²).
pub fn poisson_binomial(probabilities: &[f64]) -> Vec<f64> {
    let mut counts = vec![1.0];
    for &p in probabilities {
        let p = p.clamp(0.0, 1.0);
        counts.push(0.0);
        for i in (1..counts.len()).rev() {
            counts[i] = counts[i] * (1.0 - p) + counts[i - 1] * p;
        }
        counts[0] *= 1.0 - p;
    }
    counts
}

/// When the last of a layer's experts is computed (reference 7): those in memory take `resident_ms` in all and start at once;
/// `misses` are `(fetch, compute)` in ms, fetched one after another from the start, each computed when it has landed and
/// the one before it is done.
pub fn in_order(resident_ms: f64, misses: impl IntoIterator<Item = (f64, f64)>) -> f64 {
    let (mut computed, mut fetched) = (resident_ms, 0.0);
    for (fetch, compute) in misses {
        fetched += fetch;
        computed = f64::max(computed, fetched) + compute;
    }
    computed
}

/// [`in_order`] over `misses` equal ones, in closed form: the last of them waits for all fetches, or for all computing that
/// is left after some fetch.
pub fn in_order_equal(resident_ms: f64, misses: u32, fetch_ms: f64, compute_ms: f64) -> f64 {
    let m = f64::from(misses);
    if misses == 0 {
        return resident_ms;
    }
    // The largest over j of j·fetch + (m − j + 1)·compute is at an end: it is linear in j.
    let first = fetch_ms + m * compute_ms;
    let last = m * fetch_ms + compute_ms;
    (resident_ms + m * compute_ms).max(first).max(last)
}

/// How many experts `tokens` tokens touch, each with its share (of tokens that use it), as independent draws:
/// `P(touched) = 1 − (1 − share)^tokens`.
pub fn touched(share: f64, tokens: f64) -> f64 {
    1.0 - (1.0 - share.clamp(0.0, 1.0)).powf(tokens)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_probabilities() -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec(prop_oneof![4 => 0.0f64..1.0, 1 => Just(0.0), 1 => Just(1.0)], 0..9)
    }

    proptest! {
        /// Law: equal to the sum over all 2ⁿ patterns.
        #[test]
        fn counts_equal_enumeration(p in any_probabilities()) {
            let mut expected = vec![0.0; p.len() + 1];
            for pattern in 0..1u32 << p.len() {
                let each = |(i, p): (usize, &f64)| if pattern >> i & 1 == 1 { *p } else { 1.0 - p };
                expected[pattern.count_ones() as usize] += p.iter().enumerate().map(each).product::<f64>();
            }
            for (found, expected) in poisson_binomial(&p).iter().zip(&expected) {
                prop_assert!((found - expected).abs() < 1e-12);
            }
        }

        /// Law: closed form and walk agree; one miss more, a slower fetch or a longer computation never end earlier.
        #[test]
        fn equal_misses_equal_the_walk(r in 0.0f64..9.0, m in 0u32..12, l in 0.0f64..5.0, c in 0.0f64..5.0, by in 0.0f64..3.0) {
            let walk = |m: u32, l, c| in_order(r, (0..m).map(|_| (l, c)));
            prop_assert!((in_order_equal(r, m, l, c) - walk(m, l, c)).abs() < 1e-9);
            prop_assert!(walk(m + 1, l, c) >= walk(m, l, c));
            prop_assert!(walk(m, l + by, c) >= walk(m, l, c) && walk(m, l, c + by) >= walk(m, l, c));
            // Never sooner than either resource, never later than one after the other.
            let (link, work) = (f64::from(m) * l, r + f64::from(m) * c);
            prop_assert!(walk(m, l, c) >= link.max(work) - 1e-9 && walk(m, l, c) <= link + work + 1e-9);
        }
    }

    #[test]
    fn a_layer_without_misses_is_resident() {
        assert_eq!((in_order(3.0, []), in_order_equal(3.0, 0, 9.0, 1.0)), (3.0, 3.0));
    }

    #[test]
    fn a_mean_promises_too_much() {
        // k = 8, h = 0.9, a fetch as long as the layer: E[max(1, M)] = 1.23, max(1, E M) = 1.
        let counts = poisson_binomial(&[0.1; 8]);
        let expected: f64 = counts.iter().zip(0..).map(|(p, m)| p * f64::from(m).max(1.0)).sum();
        assert!((expected - 1.23).abs() < 0.005, "{expected}");
    }

    #[test]
    fn touched_experts_follow_the_table_of_the_reference() {
        // E, k, B → uniform D.
        for (experts, k, batch, distinct) in [(8.0, 2.0, 4.0, 5.5), (60.0, 4.0, 8.0, 25.5), (128.0, 8.0, 32.0, 111.8)] {
            let found = experts * touched(k / experts, batch);
            assert!((found - distinct).abs() < 0.06, "{found} {distinct}");
        }
    }
}

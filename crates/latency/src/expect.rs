//! Expected latency of a space of networks, exactly: each layer's time is a table over the choices that it depends on, and
//! with independent choices the expectation is a multilinear contraction. Fills tables through a closure, never predicts by
//! itself. Laws: equals the sum over all networks; the gradient is exact; at one-hot probabilities it is that network's time.

use crate::{Error, Result};

/// One layer's (or edge's) time over some variables.
#[derive(Debug, Clone, PartialEq)]
struct Table {
    name: String,
    /// Distinct, in the order of the values' axes.
    variables: Vec<usize>,
    /// Row major, ms.
    values: Vec<f64>,
}

/// A constant and a sum of tables over shared categorical variables.
#[derive(Debug, Clone, PartialEq)]
pub struct Expectation {
    /// Number of choices of each variable.
    sizes: Vec<usize>,
    constant_ms: f64,
    tables: Vec<Table>,
}

/// One table of ours has fewer entries; a larger one is a mistake in its axes.
const LIMIT: usize = 1 << 24;

impl Expectation {
    /// Over variables with these numbers of choices, with what every network costs.
    pub fn new(sizes: Vec<usize>, constant_ms: f64) -> Self {
        Self {
            sizes,
            constant_ms,
            tables: Vec::new(),
        }
    }

    /// Number of choices of each variable.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Adds a term: `time_ms(choices)` is asked once for every combination of its variables' choices. A variable that is
    /// named twice is tied to itself (a residual's in- and out-width): only the diagonal exists.
    ///
    /// # Errors
    /// [`Error::Expectation`] for an unknown variable, a table that is far too large or a time that is none; what `time_ms`
    /// returns.
    pub fn add<E: From<Error>>(
        &mut self,
        name: &str,
        variables: &[usize],
        mut time_ms: impl FnMut(&[usize]) -> Result<f64, E>,
    ) -> Result<(), E> {
        let fail = |what, found: String, expected: String| Error::Expectation {
            term: name.to_owned(),
            what,
            found,
            expected,
        };
        let mut distinct: Vec<usize> = Vec::new();
        for &variable in variables {
            if variable >= self.sizes.len() {
                return Err(fail("variable", variable.to_string(), format!("below {}", self.sizes.len())).into());
            }
            if !distinct.contains(&variable) {
                distinct.push(variable);
            }
        }
        let count = distinct
            .iter()
            .try_fold(1usize, |n, &v| n.checked_mul(self.sizes[v]).filter(|&n| n <= LIMIT));
        let count = count.ok_or_else(|| fail("entries", "more".into(), format!("at most {LIMIT}")))?;
        let mut values = Vec::with_capacity(count);
        let mut choice = vec![0usize; self.sizes.len()];
        for _ in 0..count {
            let at: Vec<usize> = variables.iter().map(|&v| choice[v]).collect();
            let ms = time_ms(&at)?;
            if !ms.is_finite() {
                return Err(fail("time", ms.to_string(), "a finite one in ms".into()).into());
            }
            values.push(ms);
            // Count up, last variable fastest.
            for &variable in distinct.iter().rev() {
                choice[variable] += 1;
                if choice[variable] < self.sizes[variable] {
                    break;
                }
                choice[variable] = 0;
            }
        }
        self.tables.push(Table {
            name: name.to_owned(),
            variables: distinct,
            values,
        });
        Ok(())
    }

    /// Time of one network: a choice for every variable. ms.
    ///
    /// # Errors
    /// [`Error::Expectation`] when a choice is missing or too large.
    pub fn at(&self, choices: &[usize]) -> Result<f64> {
        if choices.len() != self.sizes.len() || choices.iter().zip(&self.sizes).any(|(c, s)| c >= s) {
            return Err(self.mismatch("choices", format!("{choices:?}")));
        }
        let entry = |table: &Table| {
            let index = table.variables.iter().fold(0, |at, &v| at * self.sizes[v] + choices[v]);
            table.values[index]
        };
        Ok(self.constant_ms + self.tables.iter().map(entry).sum::<f64>())
    }

    /// Expected time when variable `v` takes choice `i` with probability `probabilities[v][i]`, all independent. ms.
    ///
    /// # Errors
    /// [`Error::Expectation`] for lists of other lengths.
    pub fn value(&self, probabilities: &[Vec<f64>]) -> Result<f64> {
        self.check(probabilities)?;
        let term = |table: &Table| {
            let mut rest = table.values.clone();
            for &variable in table.variables.iter().rev() {
                contract_last(&mut rest, &probabilities[variable]);
            }
            rest[0]
        };
        Ok(self.constant_ms + self.tables.iter().map(term).sum::<f64>())
    }

    /// Expected time, and its derivative by every probability: the same contraction with that axis left open.
    ///
    /// # Errors
    /// As [`Expectation::value`].
    pub fn value_and_gradient(&self, probabilities: &[Vec<f64>]) -> Result<(f64, Vec<Vec<f64>>)> {
        self.check(probabilities)?;
        let mut gradient: Vec<Vec<f64>> = self.sizes.iter().map(|&s| vec![0.0; s]).collect();
        let mut total = self.constant_ms;
        for table in &self.tables {
            // suffix[k]: axes k.. contracted; largest first.
            let mut suffix = vec![table.values.clone()];
            for &variable in table.variables.iter().rev() {
                let mut next = suffix.last().expect("begins with the table").clone();
                contract_last(&mut next, &probabilities[variable]);
                suffix.push(next);
            }
            total += suffix.last().expect("begins with the table")[0];
            let axes = table.variables.len();
            for (axis, &variable) in table.variables.iter().enumerate() {
                // Axes behind this one are contracted already; now those before it.
                let mut open = suffix[axes - 1 - axis].clone();
                for &before in &table.variables[..axis] {
                    open = contract_first(&open, &probabilities[before]);
                }
                for (sum, value) in gradient[variable].iter_mut().zip(open) {
                    *sum += value;
                }
            }
        }
        Ok((total, gradient))
    }

    /// Expected time by term, in the order they were added. ms.
    ///
    /// # Errors
    /// As [`Expectation::value`].
    pub fn terms(&self, probabilities: &[Vec<f64>]) -> Result<Vec<(&str, f64)>> {
        self.check(probabilities)?;
        let term = |table: &'_ Table| {
            let mut rest = table.values.clone();
            for &variable in table.variables.iter().rev() {
                contract_last(&mut rest, &probabilities[variable]);
            }
            rest[0]
        };
        Ok(self.tables.iter().map(|t| (t.name.as_str(), term(t))).collect())
    }

    fn check(&self, probabilities: &[Vec<f64>]) -> Result<()> {
        if probabilities.iter().map(Vec::len).eq(self.sizes.iter().copied()) {
            return Ok(());
        }
        let lengths: Vec<usize> = probabilities.iter().map(Vec::len).collect();
        Err(self.mismatch("probabilities", format!("{lengths:?}")))
    }

    fn mismatch(&self, what: &'static str, found: String) -> Error {
        Error::Expectation {
            term: "network".into(),
            what,
            found,
            expected: format!("for choices {:?}", self.sizes),
        }
    }
}

/// `[.., n] · [n] → [..]`, in place.
fn contract_last(values: &mut Vec<f64>, p: &[f64]) {
    let rows = values.len() / p.len();
    for row in 0..rows {
        values[row] = (0..p.len()).map(|i| values[row * p.len() + i] * p[i]).sum();
    }
    values.truncate(rows);
}

/// `[n, ..] · [n] → [..]`.
fn contract_first(values: &[f64], p: &[f64]) -> Vec<f64> {
    let rest = values.len() / p.len();
    let mut out = vec![0.0; rest];
    for (slice, &weight) in values.chunks(rest).zip(p) {
        for (sum, value) in out.iter_mut().zip(slice) {
            *sum += weight * value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Case = (Vec<usize>, Vec<(Vec<usize>, Vec<f64>)>, Vec<Vec<f64>>);

    /// Up to five variables of up to four choices, up to four terms over one to three of them.
    fn tiny_space() -> impl Strategy<Value = Case> {
        prop::collection::vec(1usize..5, 1..6).prop_flat_map(|sizes| {
            let count = sizes.len();
            let term = (
                prop::collection::vec(0..count, 1..4),
                prop::collection::vec(0.0f64..100.0, 64),
            );
            let p: Vec<_> = sizes.iter().map(|&s| prop::collection::vec(0.01f64..1.0, s)).collect();
            (Just(sizes), prop::collection::vec(term, 1..5), p)
        })
    }

    fn build(case: &Case) -> (Expectation, Vec<Vec<f64>>) {
        let (sizes, terms, p) = case;
        let mut expectation = Expectation::new(sizes.clone(), 1.5);
        for (variables, values) in terms {
            let mut next = values.iter().cycle();
            expectation
                .add::<Error>("term", variables, |_| Ok(*next.next().unwrap()))
                .unwrap();
        }
        let normalised = p.iter().map(|p| p.iter().map(|x| x / p.iter().sum::<f64>()).collect());
        (expectation, normalised.collect())
    }

    fn all(sizes: &[usize]) -> Vec<Vec<usize>> {
        sizes.iter().fold(vec![vec![]], |all, &size| {
            all.iter()
                .flat_map(|c| (0..size).map(|i| [c.as_slice(), &[i]].concat()).collect::<Vec<_>>())
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Law: the contraction is the sum over all networks of probability times time, to 1e-9.
        #[test]
        fn expectation_equals_enumeration(case in tiny_space()) {
            let (expectation, p) = build(&case);
            let mut sum = 0.0;
            for choices in all(expectation.sizes()) {
                let probability: f64 = choices.iter().zip(&p).map(|(&c, p)| p[c]).product();
                sum += probability * expectation.at(&choices).unwrap();
            }
            let value = expectation.value(&p).unwrap();
            prop_assert!((value - sum).abs() <= 1e-9 * sum.abs().max(1.0), "{value} {sum}");
            let (again, _) = expectation.value_and_gradient(&p).unwrap();
            prop_assert!((value - again).abs() <= 1e-9 * value.abs());
        }

        /// Law: linear in each variable, so that a finite difference of any size is the derivative.
        #[test]
        fn gradient_equals_finite_differences(case in tiny_space()) {
            let (expectation, p) = build(&case);
            let (value, gradient) = expectation.value_and_gradient(&p).unwrap();
            for v in 0..p.len() {
                for i in 0..p[v].len() {
                    let mut moved = p.clone();
                    moved[v][i] += 0.5;
                    let difference = (expectation.value(&moved).unwrap() - value) / 0.5;
                    prop_assert!((difference - gradient[v][i]).abs() <= 1e-9 * difference.abs().max(1.0));
                }
            }
        }

        /// Law: at one-hot probabilities it is the time of that network.
        #[test]
        fn one_hot_is_the_network(case in tiny_space()) {
            let (expectation, _) = build(&case);
            for choices in all(expectation.sizes()).into_iter().take(40) {
                let p: Vec<Vec<f64>> = expectation.sizes().iter().zip(&choices)
                    .map(|(&s, &c)| (0..s).map(|i| f64::from(u8::from(i == c))).collect()).collect();
                let (value, at) = (expectation.value(&p).unwrap(), expectation.at(&choices).unwrap());
                prop_assert!((value - at).abs() <= 1e-9 * at.abs().max(1.0));
            }
        }
    }

    #[test]
    fn a_residual_tie_takes_the_diagonal() {
        // Widths 16 and 32, half each; 29 for the mixed pairs that cannot occur.
        let table = [[14.0, 29.0], [29.0, 31.0]];
        let mut expectation = Expectation::new(vec![2], 0.0);
        expectation
            .add::<Error>("residual", &[0, 0], |at| Ok(table[at[0]][at[1]]))
            .unwrap();
        assert_eq!(expectation.value(&[vec![0.5, 0.5]]).unwrap(), 22.5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut expectation = Expectation::new(vec![2, 3], 0.0);
        let refused = |r: Result<()>| r.unwrap_err().to_string();
        assert!(refused(expectation.add("x", &[2], |_| Ok(1.0))).contains("variable: found 2, expected below 2"));
        assert!(refused(expectation.add("x", &[0], |_| Ok(f64::NAN))).contains("time: found NaN"));
        assert!(expectation.value(&[vec![1.0, 0.0]]).is_err());
        assert!(expectation.at(&[0, 3]).is_err());
        assert!(refused(Expectation::new(vec![4096; 3], 0.0).add("x", &[0, 1, 2], |_| Ok(1.0))).contains("entries"));
    }
}

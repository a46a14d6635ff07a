//! Quantized activations in the order that matrix kernels read them: a few tokens side by side, so that weights that were
//! unpacked once serve them all, from addresses that lie at fixed distances.
//!
//! A panel of `w` tokens is `11·w` words of 32 bits per step: four codes of each token eight times over, then the tokens'
//! scales, their sums, and the sums of their first halves, which groups of 16 ask for. Law: what is packed is what was quantized.

use cotk_quant::layout::STEP;

use super::activations::{Activations, StepCodes};

/// Words of one step of one token.
pub(crate) const STEP_WORDS: usize = 11;
/// Fours of codes in a step.
pub(crate) const DEPTHS: usize = STEP / 4;
/// Most tokens of a panel: as many sums of each kind as registers hold beside the weights.
pub(crate) const PANEL_TOKENS: usize = 12;

/// Width of the panel that serves so many tokens, at most [`PANEL_TOKENS`]: kernels are compiled for these.
fn width_for(tokens: usize) -> usize {
    match tokens {
        0..=2 => tokens,
        3..=4 => 4,
        5..=8 => 8,
        _ => PANEL_TOKENS,
    }
}

/// How many tokens of how many values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PanelsShape {
    pub(crate) tokens: usize,
    pub(crate) cols: usize,
}

impl PanelsShape {
    pub(crate) fn steps(&self) -> usize {
        self.cols.div_ceil(STEP)
    }

    /// Number of panels: as many full ones as there are, then a narrower one whose missing tokens are zeros.
    pub(crate) fn count(&self) -> usize {
        self.tokens.div_ceil(PANEL_TOKENS)
    }

    /// Words of all panels.
    pub(crate) fn words(&self) -> usize {
        let full = self.tokens / PANEL_TOKENS * PANEL_TOKENS;
        (full + width_for(self.tokens - full)) * self.steps() * STEP_WORDS
    }

    /// First of the words of a token's step, and the distance from each to the next.
    pub(crate) fn place(&self, token: usize, step: usize) -> (usize, usize) {
        let (panel, within) = (token / PANEL_TOKENS, token % PANEL_TOKENS);
        let width = width_for((self.tokens - panel * PANEL_TOKENS).min(PANEL_TOKENS));
        let before = panel * PANEL_TOKENS * self.steps();
        ((before + step * width) * STEP_WORDS + within, width)
    }
}

/// Panels of any number of tokens.
#[derive(Debug, Clone, Default)]
pub struct Panels {
    shape: PanelsShape,
    words: Vec<u32>,
}

/// The same, borrowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanelsView<'a> {
    pub(crate) shape: PanelsShape,
    pub(crate) words: &'a [u32],
}

/// Tokens side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel<'a> {
    /// Tokens that are there.
    pub(crate) tokens: usize,
    /// Tokens that there is room for: 1, 2, 4, 8 or 12.
    pub(crate) width: usize,
    pub(crate) steps: usize,
    /// `[steps, STEP_WORDS, width]`.
    words: &'a [u32],
}

impl Panels {
    /// Replaces the contents by the given tokens of `from`, in that order.
    ///
    /// # Panics
    /// A token that `from` does not have.
    pub fn gather(&mut self, from: &Activations, tokens: impl ExactSizeIterator<Item = usize>) {
        self.shape = PanelsShape {
            tokens: tokens.len(),
            cols: from.cols(),
        };
        self.words.clear();
        self.words.resize(self.shape.words(), 0);
        for (to, token) in tokens.enumerate() {
            let (mut at, width) = self.shape.place(to, 0);
            for codes in from.token(token) {
                for (i, word) in words_of(codes).into_iter().enumerate() {
                    self.words[at + i * width] = word;
                }
                at += STEP_WORDS * width;
            }
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.shape.tokens
    }

    /// Values of a token.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    pub(crate) fn view(&self) -> PanelsView<'_> {
        PanelsView {
            shape: self.shape,
            words: &self.words,
        }
    }
}

impl<'a> PanelsView<'a> {
    /// The tokens from `12 · i` on.
    pub(crate) fn panel(&self, i: usize) -> Panel<'a> {
        let tokens = (self.shape.tokens - i * PANEL_TOKENS).min(PANEL_TOKENS);
        let (width, steps) = (width_for(tokens), self.shape.steps());
        let from = i * PANEL_TOKENS * steps * STEP_WORDS;
        Panel {
            tokens,
            width,
            steps,
            words: &self.words[from..from + width * steps * STEP_WORDS],
        }
    }
}

/// The words of one token's step.
pub(crate) fn words_of(codes: &StepCodes) -> [u32; STEP_WORDS] {
    let mut words = [0; STEP_WORDS];
    for (word, four) in words.iter_mut().zip(codes.codes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(four.map(i8::cast_unsigned));
    }
    words[DEPTHS] = codes.scale.to_bits();
    words[DEPTHS + 1] = codes.sum.to_bits();
    let half: i16 = codes.codes[..STEP / 2].iter().map(|code| i16::from(*code)).sum();
    words[DEPTHS + 2] = f32::from(half).to_bits();
    words
}

impl<'a> Panel<'a> {
    /// The words of one step, `[STEP_WORDS, width]`.
    #[inline(always)]
    pub(crate) fn step(&self, step: usize) -> &'a [u32] {
        let words = self.width * STEP_WORDS;
        &self.words[step * words..(step + 1) * words]
    }

    /// All words, for kernels that walk them by address.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn start(&self) -> *const u32 {
        self.words.as_ptr()
    }

    /// One token's step, put together again.
    #[inline(always)]
    pub(crate) fn codes(&self, step: usize, token: usize) -> StepCodes {
        let words = self.step(step);
        let mut found = StepCodes {
            codes: [0; STEP],
            scale: f32::from_bits(words[DEPTHS * self.width + token]),
            sum: f32::from_bits(words[(DEPTHS + 1) * self.width + token]),
        };
        for (depth, four) in found.codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *four = words[depth * self.width + token].to_le_bytes().map(u8::cast_signed);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::dispatch::Isa;

    #[test]
    fn what_is_packed_is_what_was_quantized_and_the_rest_is_zero() {
        let isa = Isa::present()[0];
        let mut panels = Panels::default();
        for (tokens, cols) in [(1, 40), (2, 64), (3, 33), (7, 5), (12, 100), (13, 64), (40, 70)] {
            let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let acts = Activations::of(isa, &x, cols);
            panels.gather(&acts, (0..tokens).rev());
            assert_eq!((panels.tokens(), panels.cols()), (tokens, cols));
            let mut seen = 0;
            for i in 0..panels.view().shape.count() {
                let panel = panels.view().panel(i);
                for step in 0..panel.steps {
                    for token in 0..panel.width {
                        let found = panel.codes(step, token);
                        if token < panel.tokens {
                            assert_eq!(found, acts.token(tokens - 1 - (i * PANEL_TOKENS + token))[step]);
                        } else {
                            assert_eq!((found.codes, found.scale, found.sum), ([0; STEP], 0.0, 0.0));
                        }
                    }
                }
                seen += panel.tokens;
            }
            assert_eq!(seen, tokens);
        }
    }
}

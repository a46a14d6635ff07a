//! Zero-shot tasks under a model: which ending is likeliest. Reads no file: items are `cotk_data::zeroshot`'s. Law:
//! batches and shared prefixes change no log-likelihood: each ending scores as if it were alone.

use std::collections::BTreeMap;
use std::time::Instant;

use cotk_data::DataError;
use cotk_data::zeroshot::{Format, Item, Task};
use cotk_run::cancel::Cancel;
use cotk_run::progress::Progress;
use rayon::prelude::*;

use crate::ModelError;
use crate::layers::router::{argmax, log_sum_exp};
use crate::model::{Model, Sequence};
use crate::moe::Mode;
use crate::tokenizer::Tokenizer;

/// Cached tokens of one batch, over all of its endings: bounds memory, and cancelling is looked at between.
const BATCH_TOKENS: usize = 4096;
/// Rows whose logits are in memory at once.
const LOGIT_ROWS: usize = 512;

/// How tasks are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskOptions {
    /// Stands before every context: an ending without one needs something to follow.
    pub bos: u32,
    pub mode: Mode,
}

/// What a model makes of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskResult {
    pub name: String,
    pub format: Format,
    /// The first is the one to quote; at least one.
    pub measures: Vec<Measure>,
    /// What guessing reaches.
    pub chance: f64,
    /// Mean over items of −ln p(right ending | context).
    pub answer_nll_nats: f64,
    /// By the first measure, for each `domain` and `kind` of the items, sorted.
    pub parts: Vec<Part>,
    /// By the first measure: the ending chosen for each item; for a cloze 0 where the words were said, else 1.
    pub choices: Vec<usize>,
    /// Tokens run, shared prefixes counted once.
    pub tokens: usize,
    pub seconds: f64,
}

/// One way to choose among endings, and how often it chose right.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    pub rule: Rule,
    pub accuracy: f64,
    /// Wilson's interval.
    pub accuracy_ci95: [f64; 2],
}

/// How an ending is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Highest ln p per UTF-8 byte of the ending.
    PerByte,
    /// Highest ln p.
    Sum,
    /// Highest ln p(ending | context) − ln p(ending): what the context adds.
    Gain,
    /// Each token of the ending is the most likely one, those before it given.
    Greedy,
}

impl Rule {
    /// In tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerByte => "per-byte",
            Self::Sum => "sum",
            Self::Gain => "gain",
            Self::Greedy => "greedy",
        }
    }

    /// Of a format, the one to quote first.
    fn of(format: Format) -> &'static [Self] {
        match format {
            Format::Choice => &[Self::PerByte, Self::Sum, Self::Gain],
            Format::Cloze => &[Self::Greedy],
            Format::Pair => &[Self::PerByte, Self::Sum],
        }
    }
}

/// Items of one `domain` or `kind`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub key: &'static str,
    pub value: String,
    pub items: usize,
    pub accuracy: f64,
}

/// Scores every item of a task.
///
/// # Errors
/// An item that does not fit the model's context or has an ending without a token ([`DataError::Item`]), what the
/// runtime refuses, [`cotk_run::Error::Cancelled`].
pub fn evaluate(
    model: &Model,
    tokenizer: &Tokenizer,
    task: &Task,
    options: &TaskOptions,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<TaskResult, ModelError> {
    let clock = Instant::now();
    let rules = Rule::of(task.format);
    let with_gain = rules.contains(&Rule::Gain);
    // With a gain each item asks twice: after its context, and after nothing.
    let mut questions = Vec::new();
    for item in &task.items {
        let question = question(model, tokenizer, task, item, options.bos)?;
        if with_gain {
            let alone = Question {
                prefix: vec![options.bos],
                endings: question.endings.clone(),
            };
            questions.extend([question, alone]);
        } else {
            questions.push(question);
        }
    }
    let per_item = if with_gain { 2 } else { 1 };
    progress.begin(&format!("scoring {}", task.name), task.items.len() as u64, "items");
    let mut likelihoods = Vec::with_capacity(questions.len());
    let mut tokens = 0;
    for batch in batches(&questions, per_item) {
        cancel.check()?;
        tokens += batch.iter().map(Question::tokens).sum::<usize>();
        likelihoods.extend(score(model, batch, options.mode)?);
        progress.advance((batch.len() / per_item) as u64);
    }
    progress.end();
    let likelihoods: Vec<Answers> = likelihoods
        .chunks_exact(per_item)
        .map(|item| Answers {
            given: &item[0],
            alone: item.get(1).map(Vec::as_slice),
        })
        .collect();
    Ok(summary(
        task,
        rules,
        &likelihoods,
        tokens,
        clock.elapsed().as_secs_f64(),
    ))
}

/// A prefix and what may follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Question {
    /// Not empty.
    prefix: Vec<u32>,
    /// Each not empty.
    endings: Vec<Vec<u32>>,
}

impl Question {
    /// Tokens that the model runs: the last of an ending is only looked for.
    fn tokens(&self) -> usize {
        self.prefix.len() + self.endings.iter().map(|e| e.len() - 1).sum::<usize>()
    }

    /// Tokens in caches: each ending has its own copy of the prefix.
    fn cached(&self) -> usize {
        self.tokens() + self.prefix.len() * self.endings.len()
    }
}

fn question(model: &Model, tokenizer: &Tokenizer, task: &Task, item: &Item, bos: u32) -> Result<Question, ModelError> {
    let wrong = |key: &str, found: String, expected: String| DataError::Item {
        file: task.file.clone(),
        line: item.line,
        key: key.to_owned(),
        found,
        expected,
    };
    let keys: &[&str] = match task.format {
        Format::Choice => &["endings"],
        Format::Cloze => &["target"],
        Format::Pair => &["good", "bad"],
    };
    let mut prefix = vec![bos];
    if !item.context.is_empty() {
        prefix.extend(tokenizer.encode_bare(&item.context)?);
    }
    let mut endings = Vec::with_capacity(item.endings.len());
    for (at, ending) in item.endings.iter().enumerate() {
        let key = keys[at.min(keys.len() - 1)];
        let ids = tokenizer.encode_bare(ending)?;
        if ids.is_empty() {
            let found = format!("{ending:?}, which has no token");
            return Err(wrong(key, found, "at least one token".into()).into());
        }
        // The last token is never run.
        let (found, context) = (prefix.len() + ids.len() - 1, model.spec().context);
        if found > context {
            let key = if item.context.is_empty() { key } else { "context" };
            let expected = format!("at most {context}: the model's context");
            return Err(wrong(key, format!("{found} tokens with its ending"), expected).into());
        }
        endings.push(ids);
    }
    Ok(Question { prefix, endings })
}

/// Runs of whole items that cache about [`BATCH_TOKENS`] together.
fn batches(questions: &[Question], per_item: usize) -> impl Iterator<Item = &[Question]> {
    let mut rest = questions;
    std::iter::from_fn(move || {
        let (mut count, mut cached) = (0, 0);
        for item in rest.chunks(per_item) {
            cached += item.iter().map(Question::cached).sum::<usize>();
            if count > 0 && cached > BATCH_TOKENS {
                break;
            }
            count += item.len();
        }
        let (batch, after) = rest.split_at(count);
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// How likely an ending is.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Likelihood {
    /// ln p(ending | prefix).
    ln_p: f64,
    /// Whether each of its tokens is the most likely one.
    is_greedy: bool,
}

/// A token that is looked for in a row of logits.
struct Target {
    row: usize,
    /// Of all endings of the batch.
    ending: usize,
    token: u32,
}

/// Likelihoods of all endings of all questions. Prefixes are run once, their caches copied to each ending.
fn score(model: &Model, questions: &[Question], mode: Mode) -> Result<Vec<Vec<Likelihood>>, ModelError> {
    let width = model.spec().hidden;
    let mut caches: Vec<_> = questions.iter().map(|_| model.new_cache()).collect();
    let mut prefixes: Vec<Sequence<'_>> = questions
        .iter()
        .zip(&mut caches)
        .map(|(question, cache)| Sequence {
            tokens: &question.prefix,
            cache,
        })
        .collect();
    let all = model.hidden(&mut prefixes, mode)?.states;
    // One row per question, the last of its prefix; then one per token of an ending that another follows.
    let mut states = Vec::with_capacity(questions.len() * width);
    let mut end = 0;
    for question in questions {
        end += question.prefix.len();
        states.extend_from_slice(&all[(end - 1) * width..end * width]);
    }
    drop(all);

    let mut targets = Vec::new();
    let mut longer = Vec::new();
    let mut row = questions.len();
    let mut endings = 0;
    for (at, question) in questions.iter().enumerate() {
        for ending in &question.endings {
            targets.push(Target {
                row: at,
                ending: endings,
                token: ending[0],
            });
            for &token in &ending[1..] {
                targets.push(Target {
                    row,
                    ending: endings,
                    token,
                });
                row += 1;
            }
            if ending.len() > 1 {
                longer.push((&ending[..ending.len() - 1], caches[at].clone()));
            }
            endings += 1;
        }
    }
    drop(caches);
    if !longer.is_empty() {
        let mut sequences: Vec<Sequence<'_>> = longer
            .iter_mut()
            .map(|(tokens, cache)| Sequence { tokens, cache })
            .collect();
        states.extend(model.hidden(&mut sequences, mode)?.states);
    }

    let mut found = vec![
        Likelihood {
            ln_p: 0.0,
            is_greedy: true,
        };
        endings
    ];
    let vocab = model.spec().vocab;
    let mut by_row: Vec<Vec<&Target>> = (0..row).map(|_| Vec::new()).collect();
    for target in &targets {
        by_row[target.row].push(target);
    }
    // Terms of one ending arrive in the order of its tokens: its first row stands before all others.
    for (chunk, states) in states.chunks(LOGIT_ROWS * width).enumerate() {
        let logits = model.logits(states);
        let rows: Vec<(f64, usize)> = logits
            .par_chunks_exact(vocab)
            .map(|row| (log_sum_exp(row), argmax(row)))
            .collect();
        for (at, (norm, best)) in rows.into_iter().enumerate() {
            for target in &by_row[chunk * LOGIT_ROWS + at] {
                let ending = &mut found[target.ending];
                ending.ln_p += f64::from(logits[at * vocab + target.token as usize]) - norm;
                ending.is_greedy &= best == target.token as usize;
            }
        }
    }
    let mut rest = found.as_slice();
    Ok(questions
        .iter()
        .map(|question| {
            let (own, after) = rest.split_at(question.endings.len());
            rest = after;
            own.to_vec()
        })
        .collect())
}

/// Of one item.
struct Answers<'a> {
    given: &'a [Likelihood],
    /// Without the context, where the gain is asked for.
    alone: Option<&'a [Likelihood]>,
}

/// The index chosen. Ties: the lower one for a choice, the wrong one for a pair.
fn choose(item: &Item, format: Format, answers: &Answers<'_>, rule: Rule) -> usize {
    #[expect(clippy::cast_precision_loss, reason = "an ending's bytes are few")]
    let value = |at: usize| match rule {
        Rule::PerByte => answers.given[at].ln_p / item.endings[at].len() as f64,
        Rule::Sum => answers.given[at].ln_p,
        Rule::Gain => answers.given[at].ln_p - answers.alone.map_or(0.0, |alone| alone[at].ln_p),
        Rule::Greedy => 0.0,
    };
    match format {
        Format::Cloze => usize::from(!answers.given[0].is_greedy),
        Format::Pair => usize::from(value(0) <= value(1)),
        Format::Choice => (1..item.endings.len()).fold(0, |best, at| if value(at) > value(best) { at } else { best }),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
fn summary(task: &Task, rules: &[Rule], answers: &[Answers<'_>], tokens: usize, seconds: f64) -> TaskResult {
    let choices_by = |rule: Rule| -> Vec<usize> {
        let items = task.items.iter().zip(answers);
        items
            .map(|(item, answers)| choose(item, task.format, answers, rule))
            .collect()
    };
    let is_right = |(item, &choice): (&Item, &usize)| choice == item.answer;
    let count = task.items.len();
    let measures = rules.iter().map(|&rule| {
        let choices = choices_by(rule);
        let right = task.items.iter().zip(&choices).filter(|&pair| is_right(pair)).count();
        Measure {
            rule,
            accuracy: right as f64 / count as f64,
            accuracy_ci95: wilson95(right, count),
        }
    });
    let measures = measures.collect();
    let choices = choices_by(rules[0]);
    let mut parts: BTreeMap<(&'static str, &str), (usize, usize)> = BTreeMap::new();
    for pair in task.items.iter().zip(&choices) {
        for (key, value) in &pair.0.parts {
            let (right, items) = parts.entry((key, value)).or_default();
            *right += usize::from(is_right(pair));
            *items += 1;
        }
    }
    let parts = parts.into_iter().map(|((key, value), (right, items))| Part {
        key,
        value: value.to_owned(),
        items,
        accuracy: right as f64 / items as f64,
    });
    let nll: f64 = task
        .items
        .iter()
        .zip(answers)
        .map(|(item, a)| -a.given[item.answer].ln_p)
        .sum();
    TaskResult {
        name: task.name.clone(),
        format: task.format,
        measures,
        chance: task.chance(),
        answer_nll_nats: nll / count as f64,
        parts: parts.collect(),
        choices,
        tokens,
        seconds,
    }
}

/// Wilson's score interval at 95 % (Wilson, 1927): holds near 0 and 1, where the normal one does not.
#[expect(clippy::cast_precision_loss, reason = "counts are small")]
pub fn wilson95(right: usize, of: usize) -> [f64; 2] {
    let (k, n, z) = (right as f64, of as f64, 1.959_964);
    let z2 = z * z;
    let centre = (k + z2 / 2.0) / (n + z2);
    let half = z / (n + z2) * (k * (n - k) / n + z2 / 4.0).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use cotk_data::zeroshot;
    use cotk_run::progress::Silent;

    use super::*;
    use crate::folder::ModelFolder;
    use crate::reference::PlainMoe;

    fn tiny() -> (ModelFolder, Model) {
        let folder =
            ModelFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tiny-qwen2moe")).unwrap();
        let runtime = Arc::new(PlainMoe::load(&folder.spec, folder.source.as_ref()).unwrap());
        let model = Model::load(folder.spec.clone(), folder.source.as_ref(), runtime).unwrap();
        (folder, model)
    }

    fn task(name: &str) -> Task {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tiny-qwen2moe/tasks");
        zeroshot::read(folder.join(name)).unwrap()
    }

    const OPTIONS: TaskOptions = TaskOptions {
        bos: 0,
        mode: Mode::Exact,
    };

    /// The rule as it is written: one forward pass per ending over all of its tokens.
    fn one_by_one(model: &Model, question: &Question) -> Vec<Likelihood> {
        let vocab = model.spec().vocab;
        let alone = |ending: &Vec<u32>| {
            let tokens = [question.prefix.clone(), ending.clone()].concat();
            let mut cache = model.new_cache();
            let hidden = model.hidden(
                &mut [Sequence {
                    tokens: &tokens,
                    cache: &mut cache,
                }],
                Mode::Exact,
            );
            let logits = model.logits(&hidden.unwrap().states);
            let mut found = Likelihood {
                ln_p: 0.0,
                is_greedy: true,
            };
            for at in question.prefix.len()..tokens.len() {
                let row = &logits[(at - 1) * vocab..at * vocab];
                let token = tokens[at] as usize;
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                found.ln_p += f64::from(row[token]) - sum.ln();
                found.is_greedy &= row.iter().all(|&x| x <= row[token]);
            }
            found
        };
        question.endings.iter().map(alone).collect()
    }

    #[test]
    fn batches_and_shared_prefixes_change_no_likelihood() {
        let (folder, model) = tiny();
        for name in ["choice.jsonl", "cloze.jsonl", "pair.jsonl"] {
            let task = task(name);
            let questions: Vec<Question> = task
                .items
                .iter()
                .map(|item| question(&model, &folder.tokenizer, &task, item, 0).unwrap())
                .collect();
            let found = score(&model, &questions, Mode::Exact).unwrap();
            for (question, found) in questions.iter().zip(found) {
                for (found, alone) in found.iter().zip(one_by_one(&model, question)) {
                    assert!(
                        (found.ln_p - alone.ln_p).abs() < 1e-4 * alone.ln_p.abs().max(1.0),
                        "{name}"
                    );
                    assert_eq!(found.is_greedy, alone.is_greedy, "{name}");
                }
            }
        }
    }

    #[test]
    fn batches_hold_every_question_once_and_no_more_than_they_may() {
        let of = |prefix: usize, endings: usize| Question {
            prefix: vec![0; prefix],
            endings: vec![vec![0; 10]; endings],
        };
        let questions: Vec<Question> = (0..40)
            .flat_map(|i| [of(i * 17 + 1, 2 + i % 3), of(1, 2 + i % 3)])
            .chain([of(5000, 4), of(1, 4)])
            .collect();
        let batches: Vec<&[Question]> = batches(&questions, 2).collect();
        assert_eq!(batches.concat(), questions);
        for batch in batches {
            assert!(batch.len() % 2 == 0);
            let cached: usize = batch.iter().map(Question::cached).sum();
            assert!(batch.len() == 2 || cached <= BATCH_TOKENS, "{cached}");
        }
    }

    #[test]
    fn choices_follow_the_rules_and_ties_have_their_own() {
        let item = |endings: &[&str]| Item {
            line: 1,
            context: "c".into(),
            endings: endings.iter().map(|e| (*e).to_owned()).collect(),
            answer: 0,
            parts: Vec::new(),
        };
        let ln = |values: &[f64]| -> Vec<Likelihood> {
            let of = |&ln_p: &f64| Likelihood {
                ln_p,
                is_greedy: ln_p == 0.0,
            };
            values.iter().map(of).collect()
        };
        let (given, alone) = (ln(&[-6.0, -4.0, -9.0]), ln(&[-6.0, -4.0, -20.0]));
        let answers = Answers {
            given: &given,
            alone: Some(&alone),
        };
        let three = item(&["abcdef", "ab", "abcdef"]);
        let by = |rule| choose(&three, Format::Choice, &answers, rule);
        assert_eq!((by(Rule::PerByte), by(Rule::Sum), by(Rule::Gain)), (0, 1, 2));
        let tied = ln(&[-2.0, -2.0]);
        let answers = Answers {
            given: &tied,
            alone: None,
        };
        assert_eq!(choose(&item(&["a", "b"]), Format::Choice, &answers, Rule::Sum), 0);
        assert_eq!(
            choose(&item(&["a", "b"]), Format::Pair, &answers, Rule::Sum),
            1,
            "a tie is wrong"
        );
        assert_eq!(
            choose(&item(&["a"]), Format::Cloze, &answers, Rule::Greedy),
            1,
            "another word was likelier"
        );
    }

    #[test]
    fn wilson_agrees_with_its_table_and_stays_within_0_and_1() {
        // R: binom::binom.confint(c(0, 5, 10), 10, method = "wilson").
        for (right, lo, hi) in [(0, 0.0, 0.277_533), (5, 0.236_593, 0.763_407), (10, 0.722_467, 1.0)] {
            let [found_lo, found_hi] = wilson95(right, 10);
            assert!(
                (found_lo - lo).abs() < 1e-5 && (found_hi - hi).abs() < 1e-5,
                "{found_lo} {found_hi}"
            );
        }
    }

    #[test]
    fn an_item_that_does_not_fit_is_named() {
        let (folder, model) = tiny();
        let long = Item {
            line: 7,
            context: "cat ".repeat(400),
            endings: vec!["a".into(), "b".into()],
            answer: 0,
            parts: Vec::new(),
        };
        let task = Task {
            items: vec![long],
            ..task("choice.jsonl")
        };
        let error = evaluate(&model, &folder.tokenizer, &task, &OPTIONS, &Silent, &Cancel::new()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("line 7: `context`: found") && text.contains("at most 256"),
            "{text}"
        );
    }

    #[test]
    fn the_tiny_checkpoint_knows_its_own_language() {
        let (folder, model) = tiny();
        for name in ["choice.jsonl", "cloze.jsonl", "pair.jsonl"] {
            let task = task(name);
            let found = evaluate(&model, &folder.tokenizer, &task, &OPTIONS, &Silent, &Cancel::new()).unwrap();
            let [lo, hi] = found.measures[0].accuracy_ci95;
            assert!(lo <= found.measures[0].accuracy && found.measures[0].accuracy <= hi);
            assert!(lo > found.chance, "{name}: {found:?}");
            assert_eq!(found.choices.len(), task.items.len());
        }
    }
}

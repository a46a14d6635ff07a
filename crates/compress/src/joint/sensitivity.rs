//! What an error of one layer and matrix kind costs at the model's end: KL with that kind of that layer alone rounded to
//! nearest, over the error that the first pass measured for the same rounding. Law: measured once, kept in the journal.

use cotk_model::layers::Mlp;
use cotk_model::layers::linear::Linear;
use cotk_quant::decode::decode;
use cotk_quant::encode::encode;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::offers::{Offered, probe_form};
use crate::Result;
use crate::choice::Kind;
use crate::contest::judge::mean_kl;
use crate::partial::{Entry, Partial};
use crate::pipeline::Job;
use crate::prune::experts::Experts;
use crate::states::Stream;

/// KL at the end of the model, nats, for each MoE layer with gate, up or down alone rounded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KindSensitivity {
    /// Calibration tokens.
    pub tokens: usize,
    pub kl_nats: Vec<[f64; 3]>,
}

impl Job<'_> {
    /// Sets the sensitivities of offers; each layer is loaded once, the source's stream forks in it three times, and the
    /// forks walk on beside each other.
    pub(crate) fn weigh(&self, partial: &mut Partial, offered: &mut [Offered], tokens: usize) -> Result<()> {
        if tokens == 0 || offered.is_empty() {
            return Ok(());
        }
        let found = match partial.kind_sensitivity() {
            Some(found) => found.clone(),
            None => {
                let found = self.probe_kinds(partial, tokens)?;
                partial.finished(Entry::Kinds(found.clone()))?;
                found
            }
        };
        for (layer, kl) in offered.iter_mut().zip(&found.kl_nats) {
            for kind in Kind::ALL.map(|kind| kind as usize) {
                let error = layer.probed[kind];
                layer.offers.sensitivity[kind] = if error > 0.0 { kl[kind].max(0.0) / error } else { 0.0 };
            }
        }
        Ok(())
    }

    fn probe_kinds(&self, partial: &Partial, tokens: usize) -> Result<KindSensitivity> {
        self.with
            .progress
            .begin("weighing layers", self.layers() as u64, "layers");
        let windows = self.probe_windows(tokens);
        let lengths: Vec<usize> = windows.iter().map(|w| w.len()).collect();
        let stream = |name: &str| {
            let hidden = self.source.files.spec.hidden;
            Stream::new(&partial.states(), name, hidden, lengths.clone())
        };
        let teacher = stream("probe-teacher");
        self.embed(&teacher, &windows)?;
        let mut forks: Vec<Stream> = Vec::new();
        for index in 0..self.layers() {
            let (layer, experts) = self.load_whole(index)?;
            for fork in &forks {
                self.step_under(&layer, experts.as_ref(), None, index, fork, fork)?;
                fork.forget(index);
            }
            if let Some(experts) = &experts {
                for kind in Kind::ALL {
                    let fork = stream(&format!("probe-{index}-{}", kind.name()));
                    let rounded = self.rounded(experts, kind)?;
                    self.step_under(&layer, Some(&rounded), None, index, &teacher, &fork)?;
                    forks.push(fork);
                }
            }
            self.step_under(&layer, experts.as_ref(), None, index, &teacher, &teacher)?;
            teacher.forget(index);
            self.with.progress.advance(1);
        }
        let mut kl_nats = Vec::with_capacity(forks.len() / 3);
        for of_layer in forks.chunks_exact(3) {
            let mut kl = [0.0; 3];
            for (kl, fork) in kl.iter_mut().zip(of_layer) {
                *kl = mean_kl(&self.score_windows(&windows, &teacher, fork)?);
                fork.forget(self.layers());
            }
            kl_nats.push(kl);
        }
        teacher.forget(self.layers());
        self.with.progress.end();
        Ok(KindSensitivity {
            tokens: lengths.iter().sum(),
            kl_nats,
        })
    }

    /// The same experts with one kind of matrix rounded to nearest.
    fn rounded(&self, experts: &Experts, kind: Kind) -> Result<Experts> {
        let round = |linear: &Linear| -> Result<Linear> {
            let form = probe_form();
            let format = form.format(linear.outputs(), linear.inputs())?;
            let coded = encode(&linear.weights(), format)?;
            let weights = decode(&coded.prefix(form.code.full())?);
            Ok(Linear::new(weights, linear.outputs(), linear.inputs()))
        };
        let of = |mlp: &Mlp| -> Result<Mlp> {
            let mut mlp = mlp.clone();
            match kind {
                Kind::Gate => mlp.gate = round(&mlp.gate)?,
                Kind::Up => mlp.up = round(&mlp.up)?,
                Kind::Down => mlp.down = round(&mlp.down)?,
            }
            Ok(mlp)
        };
        Ok(Experts {
            mlps: experts.mlps.par_iter().map(of).collect::<Result<_>>()?,
            hidden: experts.hidden,
        })
    }
}

//! Choosing the next token from logits.

use std::collections::{HashMap, HashSet};

use crate::{Error, Result};

/// How the next token is chosen. The default is greedy.
///
/// Order of the steps: penalties, temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from a logit for each time its token was generated.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of each token that was generated.
    pub presence_penalty: f32,
    /// Start of the random numbers: the same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`Error::Setting`] for the first one outside its range.
    pub fn validate(&self) -> Result<()> {
        let range = |setting, wanted, value: f32, ok: bool| {
            if ok && value.is_finite() {
                Ok(())
            } else {
                Err(Error::Setting { setting, wanted, found: value.to_string() })
            }
        };
        range("temperature", "0 or more", self.temperature, self.temperature >= 0.0)?;
        range("top_p", "above 0 and at most 1", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0)?;
        range("min_p", "from 0 to 1", self.min_p, (0.0..=1.0).contains(&self.min_p))?;
        range("repetition_penalty", "above 0", self.repetition_penalty, self.repetition_penalty > 0.0)?;
        range("frequency_penalty", "a finite number", self.frequency_penalty, true)?;
        range("presence_penalty", "a finite number", self.presence_penalty, true)
    }
}

/// Chooses tokens one after the other and remembers what it chose.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    /// State of SplitMix64 (Steele et al. 2014): a few lines, and the same numbers in every version.
    random: u64,
    /// Times that each token was generated.
    generated: HashMap<u32, u32>,
    /// Tokens of prompt and answer, for the repetition penalty.
    seen: HashSet<u32>,
}

impl Sampler {
    /// A sampler for one answer to `prompt`.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn new(settings: Sampling, prompt: &[u32]) -> Result<Sampler> {
        settings.validate()?;
        let seen = if settings.repetition_penalty == 1.0 {
            HashSet::new()
        } else {
            prompt.iter().copied().collect()
        };
        Ok(Sampler { random: settings.seed, settings, generated: HashMap::new(), seen })
    }

    /// Chooses a token and counts it as generated. `logits` are changed by the penalties.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN or an infinite logit, [`Error::NoLogits`].
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        if let Some(token) = logits.iter().position(|l| !l.is_finite()) {
            return Err(Error::NotFinite { token, value: logits[token] });
        }
        self.penalise(logits);
        let token = if self.settings.temperature == 0.0 { most_likely(logits)? } else { self.draw(logits)? };
        let token = u32::try_from(token).map_err(|_| Error::TooLong)?;
        self.count(token);
        Ok(token)
    }

    /// The same where only the largest logits of a vocabulary are known: their tokens and values, the largest first, equal ones in
    /// the order of their tokens. `None`, and nothing is chosen, where they do not decide: the whole row must be asked for.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::NoLogits`].
    pub fn sample_top(&mut self, top: &[(u32, f32)], vocabulary: usize) -> Result<Option<u32>> {
        if let Some((token, value)) = top.iter().find(|(_, l)| !l.is_finite()) {
            return Err(Error::NotFinite { token: *token as usize, value: *value });
        }
        let (_, largest) = *top.first().ok_or(Error::NoLogits)?;
        let (_, smallest) = top[top.len() - 1];
        let s = &self.settings;
        let decided = match () {
            () if !self.may_be_decided_by_top() => false,
            () if top.len() >= vocabulary || s.temperature == 0.0 => true,
            () if s.top_k > 0 => s.top_k <= top.len(),
            // What is not known is at most as likely as the least likely of those.
            () => self.weight(smallest, largest) < f64::from(s.min_p),
        };
        if !decided {
            return Ok(None);
        }
        let token = match s.temperature == 0.0 {
            true => top[0].0,
            false => {
                let kept = top.iter().map(|&(token, l)| (token as usize, l)).collect();
                u32::try_from(self.draw_among(kept, largest)?).map_err(|_| Error::TooLong)?
            }
        };
        self.count(token);
        Ok(Some(token))
    }

    /// Whether the largest logits may decide, whatever the others are: see [`Sampler::sample_top`]. Penalties may lift any token over
    /// others, and the sum that top-p is a part of is one over all tokens where top-k does not cut them off before.
    pub fn may_be_decided_by_top(&self) -> bool {
        let s = &self.settings;
        let penalises =
            s.repetition_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0;
        let bounded = s.temperature == 0.0 || s.top_k > 0 || (s.min_p > 0.0 && s.top_p == 1.0);
        !penalises && bounded
    }

    /// How many of the largest logits are enough for certain, where that is known before.
    pub fn most_wanted(&self) -> Option<usize> {
        let s = &self.settings;
        match s.temperature == 0.0 {
            true => Some(1),
            false => (s.top_k > 0).then_some(s.top_k),
        }
    }

    fn count(&mut self, token: u32) {
        *self.generated.entry(token).or_insert(0) += 1;
        if self.settings.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
    }

    /// Whether the choice is always the largest logit, whatever was said before: then a device can make it.
    pub fn takes_largest(&self) -> bool {
        let s = &self.settings;
        s.temperature == 0.0
            && s.repetition_penalty == 1.0
            && s.frequency_penalty == 0.0
            && s.presence_penalty == 0.0
    }

    fn penalise(&self, logits: &mut [f32]) {
        for token in &self.seen {
            if let Some(l) = logits.get_mut(*token as usize) {
                *l = if *l > 0.0 {
                    *l / self.settings.repetition_penalty
                } else {
                    *l * self.settings.repetition_penalty
                };
            }
        }
        let (frequency, presence) = (self.settings.frequency_penalty, self.settings.presence_penalty);
        if frequency != 0.0 || presence != 0.0 {
            for (token, count) in &self.generated {
                if let Some(l) = logits.get_mut(*token as usize) {
                    *l -= frequency * *count as f32 + presence;
                }
            }
        }
    }

    /// Probability relative to that of the most likely token, in f64 so that the sum over a vocabulary is exact enough.
    fn weight(&self, logit: f32, largest: f32) -> f64 {
        f64::from((logit - largest) / self.settings.temperature).exp()
    }

    fn draw(&mut self, logits: &[f32]) -> Result<usize> {
        let largest = logits[most_likely(logits)?];
        let s = &self.settings;
        let mut kept: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
        // Every logit is finite here. Of equal ones the first comes first, as where a device looks for the largest.
        let by_logit = |a: &(usize, f32), b: &(usize, f32)| {
            b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal).then(a.0.cmp(&b.0))
        };
        if s.top_k > 0 && s.top_k < kept.len() {
            kept.select_nth_unstable_by(s.top_k - 1, by_logit);
            kept.truncate(s.top_k);
        }
        if s.top_k > 0 || s.top_p < 1.0 || s.min_p > 0.0 {
            kept.sort_unstable_by(by_logit);
        }
        self.draw_among(kept, largest)
    }

    /// Draws one of some tokens and logits, which are in order, the largest first, where settings cut any off.
    fn draw_among(&mut self, mut kept: Vec<(usize, f32)>, largest: f32) -> Result<usize> {
        let s = &self.settings;
        if s.top_k > 0 {
            kept.truncate(s.top_k);
        }
        let mut kept: Vec<(usize, f64)> =
            kept.into_iter().map(|(i, l)| (i, self.weight(l, largest))).collect();
        if s.top_p < 1.0 {
            let wanted = kept.iter().map(|(_, w)| w).sum::<f64>() * f64::from(s.top_p);
            let mut sum = 0.0;
            let enough = kept.iter().position(|(_, w)| {
                sum += w;
                sum >= wanted
            });
            kept.truncate(enough.map_or(kept.len(), |i| i + 1));
        }
        if s.min_p > 0.0 {
            kept.retain(|(_, w)| *w >= f64::from(s.min_p));
        }
        let total: f64 = kept.iter().map(|(_, w)| w).sum();
        let mut left = self.uniform() * total;
        for (token, w) in &kept {
            left -= w;
            if left < 0.0 {
                return Ok(*token);
            }
        }
        // Rounding can leave a rest; the last kept token takes it.
        kept.last().map(|(token, _)| *token).ok_or(Error::NoLogits)
    }

    /// A number in `0.0 .. 1.0`.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The first of the largest logits.
fn most_likely(logits: &[f32]) -> Result<usize> {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    if logits.is_empty() { Err(Error::NoLogits) } else { Ok(best) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(settings: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(settings, &[]).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&mut logits.to_vec()).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(Sampling::default(), &[]).unwrap();
        assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 2.0f32.ln(), 5.0f32.ln()];
        let c = counts(Sampling { temperature: 1.0, seed: 7, ..Sampling::default() }, &logits, 80_000);
        for (count, share) in c.iter().zip([0.125, 0.25, 0.625]) {
            assert!((*count as f64 / 80_000.0 - share).abs() < 0.01, "{c:?}");
        }
    }

    #[test]
    fn filters_remove_exactly_the_unlikely_tokens() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        let zero = |s: Sampling| counts(s, &logits, 3000).iter().map(|&c| c > 0).collect::<Vec<_>>();
        assert_eq!(zero(hot.clone()), [true; 4]);
        assert_eq!(zero(Sampling { top_k: 2, ..hot.clone() }), [true, true, false, false]);
        assert_eq!(zero(Sampling { top_p: 0.8, ..hot.clone() }), [true, true, true, false]);
        assert_eq!(zero(Sampling { top_p: 1e-5, ..hot.clone() }), [true, false, false, false]);
        assert_eq!(zero(Sampling { min_p: 0.29, ..hot }), [true, true, true, false]);
    }

    /// The largest of some logits, as a device gives them.
    fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, l)| (i as u32, *l)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(n);
        all
    }

    #[test]
    fn the_largest_logits_give_what_all_of_them_give_wherever_they_decide() {
        // Steps of a quarter, so that many are equal; far from the largest, so that differences round.
        let logits = |round: u32| -> Vec<f32> {
            (0..300u32)
                .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(round * 977) >> 24) as f32 * 0.25 + 1e-6)
                .collect()
        };
        let hot = |s: Sampling| Sampling { temperature: 3.0, seed: 5, ..s };
        let base = Sampling::default;
        for (settings, decides) in [
            (hot(Sampling { top_k: 1, ..base() }), true),
            (hot(Sampling { top_k: 20, ..base() }), true),
            (hot(Sampling { top_k: 64, ..base() }), true),
            (hot(Sampling { top_k: 20, top_p: 0.8, ..base() }), true),
            (hot(Sampling { top_k: 20, top_p: 0.9, min_p: 0.05, ..base() }), true),
            (hot(Sampling { min_p: 0.2, ..base() }), true),
            (base(), true),
            (hot(Sampling { min_p: 1e-9, ..base() }), false),
            (hot(Sampling { top_k: 65, ..base() }), false),
            (hot(Sampling { top_p: 0.5, ..base() }), false),
            (hot(Sampling { top_p: 0.5, min_p: 0.2, ..base() }), false),
            (hot(base()), false),
            (hot(Sampling { top_k: 20, presence_penalty: 0.1, ..base() }), false),
            (hot(Sampling { top_k: 20, frequency_penalty: 0.1, ..base() }), false),
            (hot(Sampling { top_k: 20, repetition_penalty: 1.1, ..base() }), false),
        ] {
            let mut whole = Sampler::new(settings.clone(), &[]).unwrap();
            let mut some = whole.clone();
            for round in 0..200 {
                let mut row = logits(round);
                let found = some.sample_top(&top(&row, 64), row.len()).unwrap();
                assert_eq!(found.is_some(), decides, "{settings:?}");
                let wanted = whole.sample(&mut row).unwrap();
                assert!(found.is_none_or(|f| f == wanted), "{settings:?}, {round}");
            }
            // A vocabulary that is known whole decides with any bound.
            let row = logits(0);
            let all = some.sample_top(&top(&row, 300), 300).unwrap();
            assert_eq!(all.is_some(), some.may_be_decided_by_top());
        }
        let mut s = Sampler::new(Sampling::default(), &[]).unwrap();
        assert!(matches!(s.sample_top(&[], 5), Err(Error::NoLogits)));
        assert!(matches!(s.sample_top(&[(3, f32::NAN)], 5), Err(Error::NotFinite { token: 3, .. })));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
        let draw = |seed| {
            let settings = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let mut s = Sampler::new(settings, &[]).unwrap();
            (0..32).map(|_| s.sample(&mut [0.0; 50]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn frequency_penalty_counts_generated_tokens_and_not_the_prompt() {
        let settings = Sampling { frequency_penalty: 0.4, ..Sampling::default() };
        let mut s = Sampler::new(settings, &[0, 0, 0, 0, 0]).unwrap();
        let chosen: Vec<u32> = (0..4).map(|_| s.sample(&mut [1.0, 0.5]).unwrap()).collect();
        assert_eq!(chosen, [0, 0, 1, 0]);
    }

    #[test]
    fn repetition_penalty_counts_the_prompt_and_shrinks_towards_unlikely() {
        let settings = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(Sampler::new(settings.clone(), &[0]).unwrap().sample(&mut [1.0, 0.6]).unwrap(), 1);
        assert_eq!(Sampler::new(settings, &[0]).unwrap().sample(&mut [-1.0, -1.5]).unwrap(), 1);
    }

    #[test]
    fn presence_penalty_counts_once() {
        let settings = Sampling { presence_penalty: 0.3, ..Sampling::default() };
        let mut s = Sampler::new(settings, &[]).unwrap();
        let chosen: Vec<u32> = (0..3).map(|_| s.sample(&mut [1.0, 0.5]).unwrap()).collect();
        assert_eq!(chosen, [0, 0, 0]);
    }

    #[test]
    fn logits_that_are_not_finite_are_named() {
        let mut s = Sampler::new(Sampling::default(), &[]).unwrap();
        assert!(matches!(s.sample(&mut [0.0, f32::NAN]), Err(Error::NotFinite { token: 1, .. })));
        assert!(matches!(s.sample(&mut []), Err(Error::NoLogits)));
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        for bad in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
        ] {
            assert!(matches!(Sampler::new(bad, &[]), Err(Error::Setting { .. })));
        }
    }
}

//! Lines that the engine works on.

use super::bad_lines::guarded;
use super::record::Line;
use crate::generate::{Completed, Generate};
use crate::rewrite::{Rewriting, Work};
use std::collections::{BTreeMap, HashMap};

/// A line on its way.
pub struct Job {
    pub line: Line,
    pub rewriting: Rewriting,
    /// The round's work, and what came of it, in its order.
    work: Work,
    parts: Vec<Option<Completed>>,
}

impl Job {
    pub fn new(line: Line, rewriting: Rewriting) -> Job {
        Job { line, rewriting, work: vec![], parts: vec![] }
    }

    /// Takes what came of a round and makes the next one's work; `false` if there is none.
    pub fn advance(&mut self) -> anyhow::Result<bool> {
        let parts: Vec<Completed> = std::mem::take(&mut self.parts).into_iter().flatten().collect();
        if !parts.is_empty() {
            self.rewriting.take(&parts);
        }
        self.work = self.rewriting.work()?;
        Ok(!self.work.is_empty())
    }
}

/// What the engine works on.
pub struct Flight<'s> {
    pub session: Box<dyn Generate + 's>,
    /// By line.
    pub jobs: BTreeMap<u64, Job>,
    /// The session's prompts: line and part.
    prompts: HashMap<u64, (u64, usize)>,
    next: u64,
    /// Maximum sequences that wait in the engine, so that it never lacks work and results wait for
    /// few lines.
    waiting: usize,
}

impl<'s> Flight<'s> {
    pub fn new(session: Box<dyn Generate + 's>, waiting: usize) -> Flight<'s> {
        Flight { session, jobs: BTreeMap::new(), prompts: HashMap::new(), next: 0, waiting }
    }

    /// Whether the engine may run out of work.
    pub fn has_room(&self) -> bool {
        self.session.waiting() < self.waiting
    }

    /// Tokens chosen so far.
    pub fn tokens(&self) -> u64 {
        self.session.generated_tokens()
    }

    /// Hands in the work of a job's round; always `true`.
    pub fn hand_in(&mut self, job: &mut Job) -> anyhow::Result<bool> {
        job.parts = vec![None; job.work.len()];
        let first = self.next;
        for (part, (ids, options)) in job.work.iter().enumerate() {
            if let Err(e) = self.session.submit(self.next, ids.clone(), options) {
                self.cancel(&(first..self.next).collect::<Vec<_>>());
                return Err(e.into());
            }
            self.prompts.insert(self.next, (job.line.number, part));
            self.next += 1;
        }
        Ok(true)
    }

    fn cancel(&mut self, ids: &[u64]) {
        self.session.cancel(ids);
        for id in ids {
            self.prompts.remove(id);
        }
    }

    /// Forgets this line and all behind it.
    pub fn cancel_from(&mut self, line: u64) {
        if self.jobs.split_off(&line).is_empty() {
            return;
        }
        let ids: Vec<u64> =
            self.prompts.iter().filter(|(_, (of, _))| *of >= line).map(|(id, _)| *id).collect();
        self.cancel(&ids);
    }

    /// One pass of the engine; jobs whose round is done come back, and those that failed alone with
    /// what was wrong.
    pub fn step(&mut self) -> anyhow::Result<Vec<(Job, Option<anyhow::Error>)>> {
        let outcomes = guarded(|| Ok(self.session.step(&mut |_| {})?))?;
        let mut done = vec![];
        for outcome in outcomes {
            let completed = match outcome {
                Ok(completed) => completed,
                Err(failed) => {
                    let of = self.prompts.remove(&failed.id);
                    if let Some(job) = of.and_then(|(line, _)| self.jobs.remove(&line)) {
                        done.push((job, Some(failed.into())));
                    }
                    continue;
                }
            };
            let Some((line, part)) = self.prompts.remove(&completed.id) else { continue };
            let Some(job) = self.jobs.get_mut(&line) else { continue };
            job.parts[part] = Some(completed);
            if job.parts.iter().all(Option::is_some) {
                done.extend(self.jobs.remove(&line).map(|job| (job, None)));
            }
        }
        Ok(done)
    }

    /// Empties a session that failed, and hands back the jobs that were in it.
    pub fn empty(&mut self) -> anyhow::Result<BTreeMap<u64, Job>> {
        self.prompts.clear();
        guarded(|| {
            self.session.reset();
            Ok(())
        })?;
        Ok(std::mem::take(&mut self.jobs))
    }

    /// Does a job whose round was interrupted to its end, with nothing beside it.
    pub fn alone(&mut self, job: &mut Job) -> anyhow::Result<()> {
        loop {
            self.hand_in(job)?;
            while !self.session.is_idle() {
                for outcome in self.session.step(&mut |_| {})? {
                    let completed = outcome?;
                    if let Some((_, part)) = self.prompts.remove(&completed.id) {
                        job.parts[part] = Some(completed);
                    }
                }
            }
            if !job.advance()? {
                return Ok(());
            }
        }
    }
}

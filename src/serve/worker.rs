//! The engine's own thread. A failure in the middle of the work ends the request that causes it,
//! and no other: the session is emptied, those that ran are tried one at a time, and what was told
//! about them already is not told again.

use super::engine::{Command, Inbox, Reply, Submission};
use super::metrics::ServerMetrics;
use crate::engine::Counters;
use crate::error::{Error, Result};
use crate::generate::text::Token;
use crate::generate::{Completed, Generate, GenerateOptions, Length, Update};
use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// Serves until all who could send work are gone. Fails if after a failure the session cannot do
/// the least of work.
pub fn run(session: &mut dyn Generate, inbox: Inbox, metrics: &ServerMetrics) -> Result<()> {
    struct End<'a>(&'a Inbox);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.pulse.end();
        }
    }
    let _end = End(&inbox);
    let worker = Worker {
        session,
        metrics,
        inbox: &inbox,
        clients: BTreeMap::new(),
        queue: VecDeque::new(),
        suspects: VecDeque::new(),
        trial: None,
        counted: Counters::default(),
    };
    worker.serve()
}

/// How far a prompt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The session does not know it.
    Queue,
    /// The session has it, and has computed nothing.
    Waiting,
    Running,
}

/// A prompt as the engine's thread sees it.
struct Client {
    submission: Submission,
    place: Place,
    accepted: bool,
    started: Option<Instant>,
    first: Option<Instant>,
    candidates: Vec<Progress>,
}

/// A candidate's text as it was told, and how much of it was said since the session was last
/// emptied.
#[derive(Clone, Default)]
struct Progress {
    told: String,
    told_tokens: usize,
    finished: bool,
    said: usize,
    said_tokens: usize,
    last: Option<Instant>,
}

impl Progress {
    /// What is new in the next piece; fails if it is not what was said before the session was
    /// emptied.
    fn fresh<'t>(&mut self, text: &'t str, tokens: &'t [Token]) -> Option<(&'t str, &'t [Token])> {
        let repeated = (self.told.len() - self.said).min(text.len());
        if text.get(..repeated)? != self.told.get(self.said..self.said + repeated)? {
            return None;
        }
        let known = (self.told_tokens - self.said_tokens).min(tokens.len());
        self.said += text.len();
        self.said_tokens += tokens.len();
        self.told.push_str(&text[repeated..]);
        self.told_tokens = self.told_tokens.max(self.said_tokens);
        Some((&text[repeated..], &tokens[known..]))
    }
}

impl Client {
    fn new(submission: Submission) -> Client {
        let candidates = vec![Progress::default(); submission.options.candidates.max(1) as usize];
        Client {
            submission,
            place: Place::Queue,
            accepted: false,
            started: None,
            first: None,
            candidates,
        }
    }

    /// Whoever asked may be gone.
    fn reply(&self, reply: Reply) {
        let _ = self.submission.replies.send(reply);
    }

    /// The last that is said. Its place is free before anybody hears it.
    fn end(self, reply: Reply) {
        let replies = self.submission.replies.clone();
        drop(self);
        let _ = replies.send(reply);
    }

    fn max_tokens(&self) -> usize {
        match self.submission.options.length {
            Length::New(n) | Length::Total(n) => n,
        }
    }

    /// Takes note of an update; fails if it contradicts what was told.
    fn update(&mut self, update: Update, metrics: &ServerMetrics) -> Result<(), &'static str> {
        let Update::Text { candidate, text, tokens, finish, .. } = update else {
            self.place = Place::Running;
            self.started.get_or_insert_with(Instant::now);
            return Ok(());
        };
        let now = Instant::now();
        let arrived = self.submission.arrived;
        let progress =
            self.candidates.get_mut(candidate as usize).ok_or("there is a candidate too many")?;
        let fresh =
            progress.fresh(text, tokens).ok_or("the engine did not repeat what it said before")?;
        let (text, tokens) = (fresh.0.to_owned(), fresh.1.to_vec());
        let finish = finish.filter(|_| !progress.finished);
        if text.is_empty() && tokens.is_empty() && finish.is_none() {
            return Ok(());
        }
        progress.finished |= finish.is_some();
        match progress.last.replace(now) {
            Some(last) => metrics.inter_token((now - last).as_secs_f64()),
            None if self.first.is_none() => {
                self.first = Some(now);
                metrics.first_token((now - arrived).as_secs_f64());
            }
            None => {}
        }
        self.reply(Reply::Text { candidate, text, tokens, finish });
        Ok(())
    }

    /// Nothing is said yet, as far as an emptied session is concerned.
    fn rewind(&mut self) {
        self.place = Place::Queue;
        self.candidates.iter_mut().for_each(|c| (c.said, c.said_tokens) = (0, 0));
    }
}

struct Worker<'w> {
    session: &'w mut dyn Generate,
    metrics: &'w ServerMetrics,
    inbox: &'w Inbox,
    clients: BTreeMap<u64, Client>,
    /// Those that the session does not know yet.
    queue: VecDeque<u64>,
    /// Those that ran when something went wrong; each is tried alone before anything else.
    suspects: VecDeque<u64>,
    /// The suspect that runs alone.
    trial: Option<u64>,
    /// What the session had done when it was last measured.
    counted: Counters,
}

impl Worker<'_> {
    fn serve(mut self) -> Result<()> {
        loop {
            let idle = self.session.is_idle() && self.queue.is_empty() && self.suspects.is_empty();
            let mut first = None;
            if idle {
                self.inbox.pulse.rest();
                let Ok(command) = self.inbox.commands.recv() else { return Ok(()) };
                self.inbox.pulse.beat();
                first = Some(command);
            }
            self.obey(first)?;
            self.admit()?;
            self.step()?;
        }
    }

    /// Does what a command says, if there is one, and what those behind it say.
    fn obey(&mut self, first: Option<Command>) -> Result<()> {
        let mut cancelled = Vec::new();
        for command in first.into_iter().chain(self.inbox.commands.try_iter()) {
            match command {
                Command::Submit(submission) => {
                    self.queue.push_back(submission.id);
                    self.clients.insert(submission.id, Client::new(*submission));
                }
                Command::Cancel(id) => cancelled.push(id),
            }
        }
        let gone = self.take_out(&cancelled)?;
        if !gone.is_empty() {
            gone.iter().for_each(|_| self.metrics.cancelled());
            self.measure();
        }
        Ok(())
    }

    /// Takes prompts out, wherever they are.
    fn take_out(&mut self, ids: &[u64]) -> Result<Vec<Client>> {
        let gone: Vec<Client> = ids.iter().filter_map(|id| self.clients.remove(id)).collect();
        if gone.is_empty() {
            return Ok(gone);
        }
        let clients = &self.clients;
        self.queue.retain(|id| clients.contains_key(id));
        self.suspects.retain(|id| clients.contains_key(id));
        let known = gone.iter().filter(|c| c.place != Place::Queue);
        let known: Vec<u64> = known.map(|c| c.submission.id).collect();
        if !known.is_empty() {
            let session = &mut *self.session;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| session.cancel(&known))) {
                self.renew(&message(panic))?;
            }
        }
        Ok(gone)
    }

    /// Hands the session what it does not know yet; a suspect alone.
    fn admit(&mut self) -> Result<()> {
        loop {
            self.trial = self.trial.filter(|id| self.clients.contains_key(id));
            if self.trial.is_some() {
                return Ok(());
            }
            self.trial = self.suspects.pop_front();
            let Some(id) = self.trial.or_else(|| self.queue.pop_front()) else { return Ok(()) };
            self.submit(id)?;
        }
    }

    fn submit(&mut self, id: u64) -> Result<()> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        let session = &mut *self.session;
        let prompt = client.submission.prompt.clone();
        match catch_unwind(AssertUnwindSafe(|| {
            session.submit(id, prompt, &client.submission.options)
        })) {
            Ok(Ok(())) => {
                client.place = Place::Waiting;
                if !std::mem::replace(&mut client.accepted, true) {
                    client.reply(Reply::Accepted);
                }
                Ok(())
            }
            Ok(Err(e)) => {
                let client = self.clients.remove(&id);
                client.into_iter().for_each(|c| c.end(Reply::Refused(e.to_string())));
                Ok(())
            }
            Err(panic) => {
                let what = message(panic);
                self.clients.remove(&id).into_iter().for_each(|c| self.fail(c, &what));
                self.renew(&what)
            }
        }
    }

    fn step(&mut self) -> Result<()> {
        self.inbox.pulse.beat();
        let (clients, metrics) = (&mut self.clients, self.metrics);
        let mut contradicted = Vec::new();
        let session = &mut *self.session;
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            session.step(&mut |update| {
                let (Update::Started { id } | Update::Text { id, .. }) = update;
                let told = clients.get_mut(&id).map_or(Ok(()), |c| c.update(update, metrics));
                contradicted.extend(told.err().map(|e| (id, e)));
            })
        }));
        let done = match stepped {
            Ok(Ok(done)) => done,
            Ok(Err(e)) => return self.recover(&e.to_string()),
            Err(panic) => return self.recover(&message(panic)),
        };
        for (id, what) in contradicted {
            self.take_out(&[id])?.into_iter().for_each(|c| self.fail(c, what));
        }
        self.measure();
        for outcome in done {
            match outcome {
                Ok(completed) => self.complete(completed),
                // the session has forgotten it already
                Err(failed) => {
                    let client = self.clients.remove(&failed.id);
                    client.into_iter().for_each(|c| self.fail(c, &failed.to_string()));
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, completed: Completed) {
        let Some(c) = self.clients.remove(&completed.id) else { return };
        let times = [Some(c.submission.arrived), c.started, c.first, Some(Instant::now())];
        self.metrics.finished(&completed, c.max_tokens(), times);
        c.end(Reply::Done(Box::new(completed)));
    }

    fn measure(&mut self) {
        let session = &*self.session;
        let counters = session.counters();
        let waiting = self.queue.len() + self.suspects.len() + session.waiting();
        self.metrics.step(session.running(), waiting, session.blocks(), (&self.counted, &counters));
        self.counted = counters;
    }

    /// Ends one request with a failure.
    fn fail(&self, client: Client, what: &str) {
        tracing::error!(
            request_id = &*client.submission.request_id,
            "the engine failed while serving it: {what}"
        );
        self.metrics.failed();
        client.end(Reply::Failed(
            "the engine failed while serving this request; the server's log says more".into(),
        ));
    }

    /// Goes on after a step that failed: if one prompt ran, it is the cause; if several did, each
    /// is tried alone.
    fn recover(&mut self, what: &str) -> Result<()> {
        let at = |place| {
            self.clients.values().filter(move |c| c.place == place).map(|c| c.submission.id)
        };
        let mut ran: Vec<u64> = at(Place::Running).collect();
        if ran.is_empty() {
            ran = at(Place::Waiting).collect();
        }
        if let [cause] = ran[..] {
            self.clients.remove(&cause).into_iter().for_each(|c| self.fail(c, what));
        } else {
            tracing::error!(
                "the engine failed while it served {} prompts; each is tried alone: {what}",
                ran.len()
            );
            ran.iter()
                .for_each(|id| self.clients.get_mut(id).expect("just listed").place = Place::Queue);
            self.suspects.extend(ran);
        }
        self.renew(what)
    }

    /// Empties the session, which has to show that it works; prompts that it knew are handed to it
    /// again.
    fn renew(&mut self, what: &str) -> Result<()> {
        let again: Vec<u64> = self
            .clients
            .values()
            .filter(|c| c.place != Place::Queue)
            .map(|c| c.submission.id)
            .collect();
        again.into_iter().rev().for_each(|id| self.queue.push_front(id));
        self.trial = None;
        self.clients.values_mut().for_each(Client::rewind);
        let session = &mut *self.session;
        let works = catch_unwind(AssertUnwindSafe(|| {
            session.reset();
            probe(session)
        }));
        let works = works.unwrap_or_else(|panic| Err(Error::Internal(message(panic))));
        works.map_err(|e| {
            Error::Internal(format!("the engine failed ({what}) and does not work since: {e}"))
        })?;
        self.counted = session.counters();
        self.metrics.restarted();
        self.inbox.pulse.beat();
        Ok(())
    }
}

/// Has an empty session do the least of work.
fn probe(session: &mut dyn Generate) -> Result<()> {
    let options =
        GenerateOptions { length: Length::New(1), ignore_eos: true, ..GenerateOptions::default() };
    session.submit(u64::MAX, vec![0], &options)?;
    for _ in 0..16 {
        match session.step(&mut |_| {})?.pop() {
            Some(Ok(_)) => return Ok(()),
            Some(Err(failed)) => return Err(failed.error),
            None => {}
        }
    }
    Err(Error::invalid("it brought no token in 16 steps"))
}

/// What a panic said.
fn message(panic: Box<dyn Any + Send>) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::engine::{EngineHandle, Generation, engine};
    use super::*;
    use crate::engine::FinishReason;
    use crate::generate::{Continuation, Failed, PromptResult};
    use crate::rewrite::Work;
    use std::sync::Arc;
    use std::time::Duration;

    /// What the first token of a prompt has the fake session do.
    const PANICS: u32 = 900;
    const FAILS: u32 = 901;
    const FAILS_ALONE: u32 = 904;
    const PANICS_AT_ONCE: u32 = 902;
    const BREAKS_FOR_GOOD: u32 = 903;

    /// A session that says the same for the same prompt, a token a step, four prompts at a time;
    /// some prompts end it.
    #[derive(Default)]
    struct Fake {
        running: Vec<(u64, Vec<u32>, usize, usize)>,
        broken: bool,
        counters: Counters,
    }

    fn word(prompt: &[u32], k: usize) -> String {
        format!("{}.{k} ", prompt[0])
    }

    impl Generate for Fake {
        fn submit(&mut self, id: u64, prompt: Vec<u32>, options: &GenerateOptions) -> Result<()> {
            assert!(prompt[0] != PANICS_AT_ONCE, "at once");
            let Length::New(length) = options.length else {
                return Err(Error::invalid("no length"));
            };
            self.running.push((id, prompt, 0, length));
            Ok(())
        }

        fn cancel(&mut self, ids: &[u64]) {
            self.running.retain(|r| !ids.contains(&r.0));
        }

        fn step(&mut self, on_update: &mut dyn FnMut(Update)) -> Result<Vec<PromptResult>> {
            assert!(!self.broken, "broken");
            self.counters.computed_tokens += self.running.len() as u64;
            let mut failed = Vec::new();
            for (id, prompt, at, length) in self.running.iter_mut().take(4) {
                if *at == 0 {
                    on_update(Update::Started { id: *id });
                }
                match prompt[0] {
                    PANICS if *at == 2 => panic!("poison"),
                    FAILS if *at == 2 => return Err(Error::invalid("poison")),
                    FAILS_ALONE if *at == 2 => {
                        failed.push(Err(Failed { id: *id, error: Error::invalid("alone") }));
                        continue;
                    }
                    BREAKS_FOR_GOOD => self.broken = true,
                    _ => {}
                }
                let token = Token { id: *at as u32, logprob: 0.0, top: vec![], end: 0 };
                *at += 1;
                let finish = (at == length).then_some(FinishReason::Length);
                let text = word(prompt, *at - 1);
                on_update(Update::Text {
                    id: *id,
                    candidate: 0,
                    text: &text,
                    tokens: &[token],
                    finish,
                });
            }
            let done = self.running.extract_if(.., |r| r.2 == r.3);
            let completed = |(id, prompt_ids, _, length): (u64, Vec<u32>, usize, usize)| {
                let text = (0..length).map(|k| word(&prompt_ids, k)).collect();
                let candidates =
                    vec![Continuation { text, tokens: vec![], finish: FinishReason::Length }];
                Completed { id, prompt_ids, prompt_scores: vec![], cached: 0, candidates }
            };
            let done: Vec<PromptResult> = done.map(|r| Ok(completed(r))).collect();
            let gone: Vec<u64> = failed
                .iter()
                .filter_map(|f: &PromptResult| f.as_ref().err().map(|f| f.id))
                .collect();
            self.running.retain(|r| !gone.contains(&r.0));
            Ok(done.into_iter().chain(failed).collect())
        }

        fn reset(&mut self) {
            self.running.clear();
        }

        fn is_idle(&self) -> bool {
            self.running.is_empty()
        }

        fn in_flight(&self) -> usize {
            self.running.len()
        }

        fn running(&self) -> usize {
            self.running.len()
        }

        fn waiting(&self) -> usize {
            0
        }

        fn blocks(&self) -> (usize, usize) {
            (self.running.len(), 64)
        }

        fn counters(&self) -> Counters {
            self.counters
        }

        fn generated_tokens(&self) -> u64 {
            0
        }
    }

    /// A worker on a thread of its own; how it ended.
    fn start(
        capacity: usize,
    ) -> (EngineHandle, Arc<ServerMetrics>, std::thread::JoinHandle<Result<()>>) {
        let (engine, inbox) = engine(capacity);
        let metrics = Arc::new(ServerMetrics::new("fake", 64));
        let own = metrics.clone();
        let thread = std::thread::spawn(move || run(&mut Fake::default(), inbox, &own));
        (engine, metrics, thread)
    }

    fn work(kinds: &[u32]) -> Work {
        let options = GenerateOptions { length: Length::New(6), ..GenerateOptions::default() };
        kinds.iter().map(|&k| (vec![k], options.clone())).collect()
    }

    /// The streamed text and the whole one, or the failure.
    async fn outcome(mut g: Generation) -> std::result::Result<(String, String), u16> {
        let mut streamed = String::new();
        loop {
            match g.next().await.expect("there is more until it is done") {
                Ok(Reply::Text { text, .. }) => streamed.push_str(&text),
                Ok(Reply::Done(c)) => return Ok((streamed, c.candidates[0].text.clone())),
                Ok(_) => {}
                Err(e) => return Err(e.status.as_u16()),
            }
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    fn value(metrics: &ServerMetrics, line: &str) -> String {
        let text = metrics.text();
        let found = text.lines().find(|l| l.starts_with(line)).unwrap_or_default();
        found.rsplit(' ').next().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_failure_ends_the_request_that_causes_it_and_no_other() {
        for poison in [PANICS, FAILS, FAILS_ALONE] {
            let (engine, metrics, thread) = start(16);
            block_on(async {
                // more than run at once; the poison among those that do, and one among those that
                // wait
                let kinds = [1, poison, 2, 3, 4, 5, poison, 6];
                let generations =
                    engine.submit(work(&kinds), &engine.owner("r".into())).await.unwrap();
                for (kind, g) in kinds.iter().zip(generations) {
                    let expected: String = (0..6).map(|k| word(&[*kind], k)).collect();
                    let expected =
                        if *kind == poison { Err(500) } else { Ok((expected.clone(), expected)) };
                    assert_eq!(outcome(g).await, expected, "nothing twice, nothing lost");
                }
                let after = engine.submit(work(&[7]), &engine.owner("r".into())).await.unwrap();
                assert!(outcome(after.into_iter().next().unwrap()).await.is_ok());
                assert_eq!((engine.in_flight(), engine.trouble(None)), (0, None));
            });
            assert_eq!(value(&metrics, "vllm:kv_cache_usage_perc"), "0");
            assert_eq!(value(&metrics, "vllm:num_requests_waiting"), "0");
            let failed = "vllm:request_success_total{engine=\"0\",finished_reason=\"error\",\
                model_name=\"fake\"}";
            assert_eq!(value(&metrics, failed), "2");
            // what the session can tell apart by itself concerns nobody else
            assert_eq!(
                value(&metrics, "bprompt:engine_restarts_total") == "0",
                poison == FAILS_ALONE
            );
            drop(engine);
            thread.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_panic_on_the_way_in_ends_one_request() {
        let (engine, _, thread) = start(16);
        block_on(async {
            let running = engine.submit(work(&[1, 2]), &engine.owner("r".into())).await.unwrap();
            let refused = engine.submit(work(&[PANICS_AT_ONCE]), &engine.owner("r".into())).await;
            assert_eq!(refused.err().map(|e| e.status.as_u16()), Some(500));
            for g in running {
                assert!(outcome(g).await.is_ok());
            }
        });
        drop(engine);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn an_engine_that_works_no_more_says_so() {
        let (engine, _, thread) = start(16);
        block_on(async {
            let mut broken =
                engine.submit(work(&[BREAKS_FOR_GOOD]), &engine.owner("r".into())).await.unwrap();
            assert_eq!(outcome(broken.remove(0)).await.err(), Some(500));
            let error = thread.join().unwrap().unwrap_err().to_string();
            assert_eq!(error, "the engine failed (broken) and does not work since: broken");
            assert_eq!(engine.trouble(None).as_deref(), Some("the engine has stopped"));
            assert_eq!(
                engine
                    .submit(work(&[1]), &engine.owner("r".into()))
                    .await
                    .err()
                    .map(|e| e.status.as_u16()),
                Some(500)
            );
        });
    }

    #[test]
    fn whoever_does_not_read_keeps_no_place() {
        let (engine, _, thread) = start(2);
        block_on(async {
            let unread = engine.submit(work(&[1, 2]), &engine.owner("r".into())).await.unwrap();
            // no answer is taken; there is room all the same, once the work is done
            let later =
                engine.submit_in_turn(work(&[3, 4]), &engine.owner("r".into())).await.unwrap();
            for g in later.into_iter().chain(unread) {
                assert!(outcome(g).await.is_ok());
            }
            assert_eq!(engine.in_flight(), 0);
        });
        drop(engine);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn an_engine_that_stands_still_is_noticed() {
        let (engine, inbox) = engine(1);
        assert_eq!(engine.trouble(Some(Duration::ZERO)), None, "it has no work");
        inbox.pulse.beat();
        std::thread::sleep(Duration::from_millis(5));
        assert!(engine.trouble(Some(Duration::ZERO)).unwrap().contains("has not moved"));
        assert_eq!(engine.trouble(Some(Duration::from_secs(60))), None);
        assert_eq!(engine.trouble(None), None);
        inbox.pulse.rest();
        assert_eq!(engine.trouble(Some(Duration::ZERO)), None);
    }
}

//! Routes, keys, bodies, and the two ways of answering: at once or as a stream. Does no arithmetic and never waits for
//! the engine on an async thread. Law: whatever arrives gets an answer in OpenAI's form with the right status.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use cotk_model::moe::Mode;
use cotk_run::seeds::Seeds;
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use crate::clock;
use crate::engine::{Engine, SpecialTokens};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::reply::{Choice, Frame};
use crate::request::{Asked, Endpoint, Prompt};
use crate::schedule::{Event, Limits, Scheduler};
use crate::sequence::{Generation, Summary};
use crate::template::ChatTemplate;

/// Longest body: far above any context, far below memory.
const BODY_LIMIT_BYTES: usize = 8 << 20;
/// Longest wait for a body.
const BODY_LIMIT_S: u64 = 30;
/// How often a silent stream says that it lives.
const PING: Duration = Duration::from_secs(15);

/// What every handler sees.
pub(crate) struct App {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) scheduler: Scheduler,
    pub(crate) template: ChatTemplate,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) limits: Limits,
    pub(crate) api_key: Option<String>,
    pub(crate) seeds: Seeds,
    pub(crate) warnings: Vec<String>,
    pub(crate) version: &'static str,
    pub(crate) started: Instant,
    pub(crate) created: u64,
    pub(crate) requests: AtomicU64,
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/cotk", get(own))
        .route("/v1/cotk/", get(own))
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::wrong_method(request.method().as_str(), request.uri().path())
        })
        .fallback(async |request: Request| ApiError::no_such_path(request.method().as_str(), request.uri().path()))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), gate))
        .with_state(app)
}

/// Checks the key and counts the answer.
async fn gate(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let endpoint = label(request.uri().path());
    let response = match authorize(&app, endpoint, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    app.metrics.answered(endpoint, response.status().as_u16());
    response
}

fn label(path: &str) -> &'static str {
    match path {
        "/health" => "/health",
        "/metrics" => "/metrics",
        "/v1/completions" => "/v1/completions",
        "/v1/chat/completions" => "/v1/chat/completions",
        "/v1/cotk" | "/v1/cotk/" => "/v1/cotk/",
        path if path == "/v1/models" || path.starts_with("/v1/models/") => "/v1/models",
        _ => "other",
    }
}

fn authorize(app: &App, endpoint: &str, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(key) = &app.api_key else { return Ok(()) };
    if endpoint == "/health" {
        return Ok(());
    }
    let sent = headers
        .get(header::AUTHORIZATION)
        .map(axum::http::HeaderValue::as_bytes);
    match sent {
        None => Err(ApiError::unauthorized(true)),
        Some(sent) => match sent.split_at_checked(7) {
            Some((scheme, sent)) if scheme.eq_ignore_ascii_case(b"bearer ") && is_same(sent, key.as_bytes()) => Ok(()),
            _ => Err(ApiError::unauthorized(false)),
        },
    }
}

/// Takes the same time wherever the keys differ.
fn is_same(sent: &[u8], key: &[u8]) -> bool {
    let differing = key.iter().enumerate().fold(sent.len() ^ key.len(), |sum, (at, byte)| {
        sum | usize::from(byte ^ sent.get(at).unwrap_or(&0))
    });
    std::hint::black_box(differing) == 0
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.scheduler.is_open() {
        axum::Json(json!({ "status": "ok" })).into_response()
    } else {
        ApiError::draining().into_response()
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, app.metrics.render()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    axum::Json(json!({ "object": "list", "data": [app.model_object()] })).into_response()
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let served = &app.engine.facts().id;
    if id == *served {
        Ok(axum::Json(app.model_object()).into_response())
    } else {
        Err(ApiError::no_such_model(&id, served))
    }
}

async fn own(State(app): State<Arc<App>>) -> Response {
    let facts = app.engine.facts();
    let (waiting, active) = app.scheduler.load();
    let kv_bytes = facts.kv_bytes_per_token * facts.context as u64;
    axum::Json(json!({
        "cotk": app.version,
        "model": facts.id,
        "family": facts.family,
        "device": facts.device,
        "context": facts.context,
        "vocab": facts.vocab,
        "modes": facts.modes.iter().map(|mode| mode.name()).collect::<Vec<_>>(),
        "default_mode": facts.modes.first().map(|mode| mode.name()),
        "slots": app.limits.slots,
        "queue_limit": app.limits.queue,
        "active": active,
        "waiting": waiting,
        "predicted_decode_ms": facts.predicted_decode_ms(),
        "kv_bytes_per_sequence": kv_bytes,
        "kv_bytes_limit": kv_bytes * app.limits.slots as u64,
        "uptime_s": app.started.elapsed().as_secs_f64(),
        "warnings": app.warnings,
    }))
    .into_response()
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    answer(app, Endpoint::Completions, request).await
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    answer(app, Endpoint::Chat, request).await
}

/// The way of a request: bytes → fields → tokens → queue → reply.
async fn answer(app: Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    let body = read_body(request.into_body()).await?;
    let asked = Asked::parse(endpoint, &body)?;
    let frame = app.frame(&asked);
    let is_streamed = asked.is_streamed;
    let resolving = Arc::clone(&app);
    // Tokenizing a long prompt takes milliseconds: not on an async thread.
    let generations = tokio::task::spawn_blocking(move || resolving.resolve(&asked))
        .await
        .map_err(|error| ApiError::engine(format!("the tokenizer panicked: {error}")))??;
    let receivers = app.scheduler.submit(generations)?;
    if is_streamed {
        Ok(streamed(frame, receivers))
    } else {
        whole(&frame, receivers).await
    }
}

async fn read_body(body: Body) -> Result<Vec<u8>, ApiError> {
    let reading = async {
        let mut bytes = Vec::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(ApiError::broken_body)?;
            if bytes.len() + chunk.len() > BODY_LIMIT_BYTES {
                return Err(ApiError::body_too_large(BODY_LIMIT_BYTES));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    };
    match tokio::time::timeout(Duration::from_secs(BODY_LIMIT_S), reading).await {
        Ok(bytes) => bytes,
        Err(_) => Err(ApiError::slow_body(BODY_LIMIT_S)),
    }
}

impl App {
    fn model_object(&self) -> Value {
        json!({ "id": self.engine.facts().id, "object": "model", "created": self.created, "owned_by": "cotk" })
    }

    fn frame(&self, asked: &Asked) -> Frame {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let prefix = match asked.endpoint {
            Endpoint::Completions => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        Frame {
            endpoint: asked.endpoint,
            id: format!("{prefix}-{:08x}{number:08x}", self.created),
            created: clock::unix_seconds(),
            model: self.engine.facts().id.clone(),
            has_logprobs: asked.logprobs.is_some(),
            is_usage_streamed: asked.is_usage_streamed,
        }
    }

    /// What the model has to say about a request: its name, its modes, its tokens, its context.
    fn resolve(&self, asked: &Asked) -> Result<Vec<Generation>, ApiError> {
        let facts = self.engine.facts();
        if let Some(model) = asked.model.as_ref().filter(|model| **model != facts.id) {
            return Err(ApiError::no_such_model(model, &facts.id));
        }
        let mode = self.mode(asked.mode)?;
        let seed = asked.seed.unwrap_or_else(|| {
            self.seeds
                .number(&format!("request {}", self.requests.load(Ordering::Relaxed)))
        });
        let mut generations = Vec::with_capacity(asked.prompts.len());
        for (index, prompt) in asked.prompts.iter().enumerate() {
            let (tokens, param) = self.tokens(prompt)?;
            let room = facts.context.saturating_sub(tokens.len());
            if room == 0 {
                return Err(ApiError::context(param, tokens.len(), facts.context.saturating_sub(1)));
            }
            let mut stops = asked.stops.clone();
            if asked.endpoint == Endpoint::Chat {
                stops.extend(self.template.stops().iter().map(|&stop| stop.to_owned()));
            }
            generations.push(Generation {
                prompt: tokens,
                max_tokens: asked.max_tokens.map_or(room, |asked| asked.min(room)),
                sampling: asked.sampling,
                seed: seed.wrapping_add(index as u64),
                stops,
                logprobs: asked.logprobs,
                mode,
            });
        }
        Ok(generations)
    }

    fn mode(&self, asked: Option<Mode>) -> Result<Mode, ApiError> {
        let modes = &self.engine.facts().modes;
        let mode = asked.or(modes.first().copied()).unwrap_or(Mode::Exact);
        if modes.contains(&mode) {
            Ok(mode)
        } else {
            let known: Vec<&str> = modes.iter().map(|mode| mode.name()).collect();
            Err(ApiError::mode(mode.name(), &known))
        }
    }

    /// The prompt's tokens, and the field that it came from.
    fn tokens(&self, prompt: &Prompt) -> Result<(Vec<u32>, &'static str), ApiError> {
        let failed = |error: crate::engine::EngineError| ApiError::engine(error.0);
        let (tokens, param) = match prompt {
            Prompt::Tokens(tokens) => {
                let vocab = self.engine.facts().vocab;
                if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                    let message = format!("token id {token}: expected below {vocab}, the size of the vocabulary");
                    return Err(ApiError::invalid("prompt", message));
                }
                (tokens.clone(), "prompt")
            }
            Prompt::Text(text) => (self.engine.encode(text, SpecialTokens::Add).map_err(failed)?, "prompt"),
            Prompt::Chat(messages) => {
                let text = self.template.render(messages)?;
                (
                    self.engine.encode(&text, SpecialTokens::InText).map_err(failed)?,
                    "messages",
                )
            }
        };
        if tokens.is_empty() {
            return Err(ApiError::invalid(param, "the prompt has 0 tokens, expected at least 1"));
        }
        Ok((tokens, param))
    }
}

/// Collects every choice, then answers.
async fn whole(frame: &Frame, receivers: Vec<Receiver<Event>>) -> Result<Response, ApiError> {
    let mut choices = Vec::with_capacity(receivers.len());
    for mut receiver in receivers {
        let mut choice = Choice::default();
        loop {
            match receiver.recv().await {
                Some(Event::Piece(delta)) => choice.push(delta),
                Some(Event::Done(summary)) => {
                    choice.summary = Some(summary);
                    break;
                }
                Some(Event::Failed(error)) => return Err(error),
                None => return Err(ApiError::draining()),
            }
        }
        choices.push(choice);
    }
    Ok(axum::Json(frame.whole(&choices)).into_response())
}

fn streamed(frame: Frame, receivers: Vec<Receiver<Event>>) -> Response {
    let chunks = chunks(frame, receivers).map(|data| Ok::<_, Infallible>(SseEvent::default().data(data)));
    let keep_alive = KeepAlive::new().interval(PING).text("ping");
    let mut response = Sse::new(chunks).keep_alive(keep_alive).into_response();
    // For proxies that would collect the stream.
    response
        .headers_mut()
        .insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    debug_assert_eq!(response.status(), StatusCode::OK);
    response
}

/// The data lines of a stream. Dropped by hyper when the client leaves; the receivers go with it, and the worker sees that.
fn chunks(frame: Frame, receivers: Vec<Receiver<Event>>) -> impl Stream<Item = String> {
    let count = receivers.len();
    let events = receivers.into_iter().enumerate().map(|(index, receiver)| {
        Box::pin(stream::unfold(receiver, move |mut receiver| async move {
            receiver.recv().await.map(|event| ((index, event), receiver))
        }))
    });
    let ready: VecDeque<String> = (0..count)
        .filter_map(|index| frame.opening(index))
        .map(|v| v.to_string())
        .collect();
    let state = Streaming {
        frame,
        events: stream::select_all(events),
        ready,
        summaries: vec![None; count],
        is_over: false,
    };
    stream::unfold(state, |mut state| async move {
        loop {
            if let Some(line) = state.ready.pop_front() {
                return Some((line, state));
            }
            if state.is_over {
                return None;
            }
            match state.events.next().await {
                Some((index, event)) => state.take(index, event),
                None => state.end_early(ApiError::draining()),
            }
        }
    })
}

struct Streaming<S> {
    frame: Frame,
    events: S,
    ready: VecDeque<String>,
    summaries: Vec<Option<Summary>>,
    is_over: bool,
}

impl<S> Streaming<S> {
    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Piece(delta) => self
                .ready
                .extend(self.frame.piece(index, &delta).map(|v| v.to_string())),
            Event::Done(summary) => {
                let finish = summary.finish;
                self.summaries[index] = Some(summary);
                let all: Option<Vec<Summary>> = self.summaries.iter().cloned().collect();
                let ending = self.frame.ending(index, finish, all.as_deref());
                self.ready.push_back(ending.to_string());
                if let Some(all) = all {
                    if self.frame.is_usage_streamed {
                        self.ready.push_back(self.frame.usage_chunk(&all).to_string());
                    }
                    self.ready.push_back("[DONE]".into());
                    self.is_over = true;
                }
            }
            Event::Failed(error) => self.end_early(error),
        }
    }

    /// After the headers an error is a data line, and no `[DONE]` follows.
    fn end_early(&mut self, error: ApiError) {
        self.ready.push_back(error.body().to_string());
        self.is_over = true;
    }
}

//! The life of the server: bind, say that it is ready, serve, drain, end. Law: the port is taken before the model is
//! loaded, so that a port in use costs no time; after a stop is asked for nothing new begins and what runs is finished,
//! or cut off when it takes too long.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use axum::serve::ListenerExt;
use cotk_run::cancel::Cancel;
use cotk_run::seeds::Seeds;

use crate::clock;
use crate::engine::Engine;
use crate::error::Error;
use crate::http::{self, App};
use crate::metrics::Metrics;
use crate::schedule::{Limits, Scheduler};
use crate::template::ChatTemplate;

/// How often a stop is looked for.
const POLL: Duration = Duration::from_millis(20);
/// What a cut sequence has to say goodbye.
const GOODBYE: Duration = Duration::from_millis(500);

/// A port that is ours; connections wait in it until [`serve`] answers them.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

impl Bound {
    /// Takes the port; 0 takes any free one.
    ///
    /// # Errors
    /// When the host is unknown, or the port in use.
    pub fn bind(host: &str, port: u16) -> Result<Self, Error> {
        let unknown = |source| Error::Host {
            host: host.to_owned(),
            source,
        };
        let address = (host, port)
            .to_socket_addrs()
            .map_err(unknown)?
            .next()
            .ok_or_else(|| unknown(io::Error::new(io::ErrorKind::NotFound, "no address")))?;
        let listener = TcpListener::bind(address).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => Error::PortInUse { address },
            _ => Error::Bind { address, source },
        })?;
        let failed = |source| Error::System {
            action: "use the listener",
            source,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether others than this machine can reach it.
    pub fn is_wide(&self) -> bool {
        !self.address.ip().is_loopback()
    }
}

/// What the command line decides.
#[derive(Debug, Clone)]
pub struct Options {
    /// Clients must send it as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    pub limits: Limits,
    /// How long running requests may take after a stop was asked for.
    pub drain: Duration,
    /// For requests that bring no seed.
    pub seeds: Seeds,
    /// Shown in `/v1/cotk/`.
    pub version: &'static str,
}

/// What was found out before the first request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// `http://host:port`.
    pub listening: String,
    pub model: String,
    pub device: String,
    /// `{"exact": ms, …}`, predicted from the profile; null without one.
    pub predicted_decode_ms: serde_json::Value,
    pub warnings: Vec<String>,
}

/// Serves until `cancel` is set and all is drained. Calls `ready` once, when requests are answered.
///
/// # Errors
/// When the async runtime, a thread or the listener fails.
pub fn serve(
    bound: Bound,
    engine: Arc<dyn Engine>,
    template: ChatTemplate,
    options: Options,
    cancel: &Cancel,
    ready: impl FnOnce(&Ready),
) -> Result<(), Error> {
    let warnings = warnings(&bound, &template, &options);
    let facts = engine.facts().clone();
    let metrics = Arc::new(Metrics::default());
    let (scheduler, worker) = Scheduler::start(Arc::clone(&engine), options.limits, Arc::clone(&metrics))?;
    let app = Arc::new(App {
        engine,
        scheduler,
        template,
        metrics,
        limits: options.limits,
        api_key: options.api_key,
        seeds: options.seeds,
        warnings: warnings.clone(),
        version: options.version,
        started: Instant::now(),
        created: clock::unix_seconds(),
        requests: AtomicU64::new(0),
    });
    let failed = |action| move |source| Error::System { action, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("cotk-http")
        .enable_all()
        .build()
        .map_err(failed("start the HTTP threads"))?;
    let address = bound.address;
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(bound.listener).map_err(failed("use the listener"))?;
        let listener = listener.tap_io(|stream| {
            // A token is a small packet that must not wait; if that cannot be had, it waits.
            let _ = stream.set_nodelay(true);
        });
        ready(&Ready {
            listening: format!("http://{address}"),
            predicted_decode_ms: facts.predicted_decode_ms(),
            model: facts.id,
            device: facts.device,
            warnings,
        });
        let stopping = Arc::clone(&app);
        let stop = async move {
            until_cancelled(cancel).await;
            stopping.scheduler.drain();
        };
        // `with_graceful_shutdown` wants a future that owns what it sees.
        let (told, heard) = tokio::sync::oneshot::channel::<()>();
        let server = axum::serve(listener, http::router(Arc::clone(&app))).with_graceful_shutdown(async {
            let _ = heard.await;
        });
        let ending = async {
            stop.await;
            let _ = told.send(());
            tokio::time::sleep(options.drain).await;
            app.scheduler.cut();
            tokio::time::sleep(GOODBYE).await;
        };
        tokio::select! {
            served = async { server.await } => served.map_err(failed("serve")),
            () = ending => Ok(()),
        }
    });
    runtime.shutdown_timeout(GOODBYE);
    app.scheduler.cut();
    // A panic of the worker's own (not of the engine, which is caught) has been printed by the panic hook.
    let _ = worker.join();
    result
}

async fn until_cancelled(cancel: &Cancel) {
    while !cancel.is_cancelled() {
        tokio::time::sleep(POLL).await;
    }
}

fn warnings(bound: &Bound, template: &ChatTemplate, options: &Options) -> Vec<String> {
    let mut warnings = Vec::new();
    if template.is_fallback() {
        warnings.push(
            "the model has no chat template: chat uses ChatML as plain text (--chat-template F gives another)".into(),
        );
    }
    if bound.is_wide() && options.api_key.is_none() {
        warnings.push(format!(
            "{} is open to other machines and asks for no key: --api-key KEY sets one",
            bound.address
        ));
    }
    warnings
}

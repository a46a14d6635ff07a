//! Two kinds of failure: [`Error`] stops the server or keeps it from starting; [`ApiError`] answers one request in
//! OpenAI's form. Law: every refusal has a status, a type, and where a field is to blame its name.

use std::net::SocketAddr;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why the server does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--host` is neither an address nor a name that resolves.
    #[error("host `{host}`: {source}")]
    Host { host: String, source: std::io::Error },
    /// Another process listens there.
    #[error("{address}: the port is in use")]
    PortInUse { address: SocketAddr },
    /// The address cannot be bound for another reason.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
    /// A chat template that does not parse: `detail` says what, `line` counts from 1.
    #[error("{origin}: chat template, line {line}: {detail}")]
    Template {
        origin: String,
        line: usize,
        detail: String,
    },
    /// A file that cannot be read.
    #[error(transparent)]
    Run(#[from] cotk_run::Error),
    /// The async runtime, a thread or the listener failed.
    #[error("cannot {action}: {source}")]
    System {
        action: &'static str,
        source: std::io::Error,
    },
}

/// Why one request is refused or failed.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`: `invalid_request_error`, `authentication_error`, `server_error`, …
    pub kind: &'static str,
    pub message: String,
    /// The field to blame, with dots: `cotk.mode`.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// What was found and what would have been right, where both are numbers or names.
    pub facts: Option<Box<(Value, Value)>>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            facts: None,
        }
    }

    /// 400: a field of the request is wrong.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
        }
    }

    /// 400: the body is not a JSON object. `message` has line and column.
    pub fn invalid_json(message: impl Into<String>) -> Self {
        Self {
            code: Some("invalid_json"),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
        }
    }

    /// 400: a field of OpenAI's that this server does not do.
    pub fn unsupported(param: &str, found: &Value, expected: &str) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            facts: Some(Box::new((found.clone(), json!(expected)))),
            ..Self::invalid(
                param,
                format!("`{param}` is not supported: found {found}, expected {expected}"),
            )
        }
    }

    /// 400: the prompt leaves no room in the context. Both in tokens.
    pub fn context(param: &'static str, found: usize, expected: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            facts: Some(Box::new((json!(found), json!(expected)))),
            ..Self::invalid(
                param,
                format!(
                    "the prompt has {found} tokens, expected at most {expected} (the context less one to generate)"
                ),
            )
        }
    }

    /// 400: the model does not have this routing mode.
    pub fn mode(found: &str, known: &[&str]) -> Self {
        Self {
            code: Some("mode_not_available"),
            facts: Some(Box::new((json!(found), json!(known)))),
            ..Self::invalid(
                "cotk.mode",
                format!(
                    "this model cannot run in mode `{found}`, expected one of: {}",
                    known.join(", ")
                ),
            )
        }
    }

    /// 401: no key, or another one.
    pub fn unauthorized(is_missing: bool) -> Self {
        let message = if is_missing {
            "no API key: send `Authorization: Bearer KEY`"
        } else {
            "wrong API key"
        };
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
        }
    }

    /// 404: another model than the one served.
    pub fn no_such_model(found: &str, expected: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            facts: Some(Box::new((json!(found), json!(expected)))),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("no model `{found}` here: this server has `{expected}`"),
            )
        }
    }

    /// 404: no such path.
    pub fn no_such_path(method: &str, path: &str) -> Self {
        Self {
            code: Some("unknown_url"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("nothing at {method} {path}"),
            )
        }
    }

    /// 405: the path exists with another method.
    pub fn wrong_method(method: &str, path: &str) -> Self {
        Self {
            code: Some("method_not_allowed"),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                format!("{path} does not take {method}"),
            )
        }
    }

    /// 408: the body did not arrive in time.
    pub fn slow_body(limit_s: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the body did not arrive within {limit_s} s"),
        )
    }

    /// 400: the connection ended inside the body.
    pub fn broken_body(detail: impl std::fmt::Display) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            format!("the body ended early: {detail}"),
        )
    }

    /// 413: the body is longer than the server reads.
    pub fn body_too_large(limit_bytes: usize) -> Self {
        Self {
            code: Some("request_too_large"),
            ..Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the body is longer than {limit_bytes} bytes"),
            )
        }
    }

    /// 429: as many requests wait as may.
    pub fn queue_full(waiting: usize, limit: usize) -> Self {
        Self {
            code: Some("queue_full"),
            facts: Some(Box::new((json!(waiting), json!(limit)))),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                format!("{waiting} requests wait already, at most {limit} may: try again later"),
            )
        }
    }

    /// 503: the server is on its way down.
    pub fn draining() -> Self {
        Self {
            code: Some("draining"),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "the server is shutting down",
            )
        }
    }

    /// 500: the engine failed. `message` names file, layer and expert where it knows them.
    pub fn engine(message: impl Into<String>) -> Self {
        Self {
            code: Some("engine_error"),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
        }
    }

    /// OpenAI's error object; found and expected under our own key.
    pub fn body(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        });
        if let Some((found, expected)) = self.facts.as_deref() {
            error["cotk"] = json!({ "found": found, "expected": expected });
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let retry = match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some("1"),
            _ => None,
        };
        if let Some(seconds) = retry {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

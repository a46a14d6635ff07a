//! What both programs do around a command: parse, watch signals, render the outcome or the fault, choose the exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use crate::commands::{Cli, Command};
use crate::context::{Context, Outcome};
use crate::fault::Fault;

/// Parses the command line and runs one command.
pub fn launch(run: impl FnOnce(&Command, &Context) -> Result<Outcome, Fault>) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return argument_error(&error),
    };
    let cx = match Context::new(&cli) {
        Ok(cx) => cx,
        Err(fault) => return render_fault(&fault, cli.command.name(), cli.global.json),
    };
    let result = run(&cli.command, &cx);
    cx.ui.finish();
    match result {
        Ok(outcome) => render(&outcome, cli.command.name(), cx.ui.is_json()),
        Err(fault) => render_fault(&fault, cli.command.name(), cx.ui.is_json()),
    }
}

fn render(outcome: &Outcome, command: &str, json: bool) -> ExitCode {
    if json {
        if !outcome.is_printed {
            let envelope = envelope_ok(command, &outcome.result, &outcome.warnings);
            print_line(&envelope.to_string());
        }
    } else {
        if !outcome.text.is_empty() {
            print_line(outcome.text.trim_end());
        }
        for warning in &outcome.warnings {
            complain(&format!("warning: {warning}"));
        }
    }
    ExitCode::from(outcome.exit_code)
}

/// The success form of `--json` (DESIGN 4).
pub fn envelope_ok(command: &str, result: &serde_json::Value, warnings: &[String]) -> serde_json::Value {
    json!({ "cotk": env!("CARGO_PKG_VERSION"), "command": command, "ok": true, "result": result, "warnings": warnings })
}

fn render_fault(fault: &Fault, command: &str, json: bool) -> ExitCode {
    let report = fault.report();
    if json {
        // Absent fields are null, so that a reader finds every key (DESIGN 4).
        let error = json!({
            "kind": report.kind, "message": report.message, "help": report.help, "file": report.file,
            "key": report.key, "found": report.found, "expected": report.expected,
        });
        print_line(
            &json!({ "cotk": env!("CARGO_PKG_VERSION"), "command": command, "ok": false, "error": error }).to_string(),
        );
    } else {
        complain(&format!("error: {}", report.message));
        if let Some(help) = &report.help {
            complain(&format!("help: {help}"));
        }
    }
    ExitCode::from(report.exit_code)
}

fn argument_error(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print(); // a closed pipe is success
        return ExitCode::SUCCESS;
    }
    let mut args = std::env::args().skip(1);
    if std::env::args().any(|arg| arg == "--json") {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let command = args.find(|arg| !arg.starts_with('-')).unwrap_or_default();
        let fault = Fault::usage(message, format!("cotk {command} --help").replace("  ", " "));
        return render_fault(&fault, &command, true);
    }
    let _ = error.print();
    ExitCode::from(2)
}

/// One line on standard output; a closed pipe is success.
pub fn print_line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// One line on standard error.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

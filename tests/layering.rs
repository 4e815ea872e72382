//! Keeps the module graph of `src/` acyclic, and `unsafe` and the async runtime where they belong.
//!
//! A single crate lets any module use any other; this test is what a workspace would have given us.

#![allow(clippy::unwrap_used, reason = "a test: a failure is the finding")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Module, then every module it may use. A module may only use modules listed above it.
const LAYERS: &[(&str, &str)] = &[
    ("error", ""),
    ("unit", "error"),
    ("monitor", "error unit"),
    ("io", "error unit"),
    ("host", "error unit io"),
    ("image", "error unit io"),
    ("layout", "error unit io"),
    ("manifest", "error unit io"),
    ("net", "error unit"),
    ("store", "error unit monitor io net"),
    ("proto", "error unit"),
    ("source", "error unit monitor io host image layout"),
    ("sink", "error unit monitor io host image manifest net store proto"),
    ("pipeline", "error unit monitor io manifest source sink"),
    ("boot", "error unit monitor io host"),
    ("guest", "error unit monitor io host image layout boot"),
    ("cloud", "error unit monitor net"),
    ("config", "error unit io"),
    ("preflight", "error unit monitor io host image layout source sink store boot guest cloud config"),
    (
        "job",
        "error unit monitor io host image layout manifest net store proto source sink pipeline boot guest cloud config preflight",
    ),
    ("receive", "error unit monitor io host image layout manifest net proto sink guest config"),
    ("lab", "error unit monitor io host net boot store cloud config"),
    ("fleet", "error unit monitor io host net store proto cloud config preflight job"),
    ("daemon", "error unit monitor io host net proto config cloud job fleet"),
    (
        "cli",
        "error unit monitor io host image layout manifest net store proto source sink pipeline boot guest cloud config preflight job receive lab fleet daemon",
    ),
];

/// Modules in which `unsafe` may be written.
const UNSAFE_OK: &[&str] = &["io", "host"];

/// Modules which may name the async runtime.
const ASYNC_OK: &[&str] = &["net", "store", "sink", "cloud", "receive", "lab", "fleet", "daemon"];

/// Longest file, its tests left out.
const MAX_LINES: usize = 800;

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// The top-level module a file belongs to: `src/image/qcow2/header.rs` and `src/image.rs` are `image`.
fn top_module(src: &Path, file: &Path) -> String {
    let first = file.strip_prefix(src).unwrap().iter().next().unwrap();
    first.to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The production part of a file: no comments, no `#[cfg(test)]` module, inline or in its own file.
fn production_code(text: &str) -> String {
    let mut kept = Vec::new();
    let mut lines = text.lines().map(without_comment).peekable();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            match lines.peek().map(|next| next.trim_end()) {
                Some(next) if next.contains("mod ") && next.ends_with('{') => break,
                Some(next) if next.contains("mod ") && next.ends_with(';') => {
                    lines.next();
                    continue;
                }
                _ => {}
            }
        }
        kept.push(line);
    }
    kept.join("\n")
}

/// The line up to a `//` which starts it or follows a space, so that URLs in strings survive.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with("//") {
        return "";
    }
    line.split(" //").next().unwrap()
}

/// Whether a `super::` path here would leave the module: then it must be spelled `crate::`.
fn climbs_out(rel: &Path, code: &str) -> bool {
    let parts: Vec<_> = rel.iter().collect();
    let is_module_root = parts.len() == 1 || (parts.len() == 2 && parts[1] == "mod.rs");
    code.contains("super::super::")
        || (is_module_root && code.lines().any(|line| line.starts_with("use super::")))
}

/// Every first segment after `crate::`, brace groups included.
fn crate_paths(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let group = match rest.strip_prefix('{') {
            Some(body) => body,
            None => {
                found.insert(first_segment(rest));
                continue;
            }
        };
        let (mut depth, mut start) = (0usize, 0usize);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    found.insert(first_segment(&group[start..i]));
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(first_segment(&group[start..i]));
                    start = i + 1;
                }
                _ => {}
            }
        }
    }
    found.remove("");
    found
}

fn first_segment(path: &str) -> String {
    let path = path.trim_start();
    if path.starts_with('*') {
        return "*".into();
    }
    path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn has_word(code: &str, word: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

#[test]
fn modules_use_only_the_layers_below_them() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let allowed: BTreeMap<&str, Vec<&str>> =
        LAYERS.iter().map(|(module, uses)| (*module, uses.split_whitespace().collect())).collect();
    let mut wrong = Vec::new();

    for (i, (module, uses)) in LAYERS.iter().enumerate() {
        for used in uses.split_whitespace() {
            if !LAYERS[..i].iter().any(|(below, _)| *below == used) {
                wrong.push(format!("LAYERS: `{module}` may use `{used}`, which is not above it"));
            }
        }
    }

    let mut files = Vec::new();
    rust_files(&src, &mut files);
    files.sort();
    for file in &files {
        let module = top_module(&src, file);
        let name = file.strip_prefix(&src).unwrap().display();
        let only_tests = file.file_name().is_some_and(|f| f == "tests.rs");
        if only_tests || matches!(module.as_str(), "lib" | "main" | "bin") {
            continue;
        }
        let Some(uses) = allowed.get(module.as_str()) else {
            wrong.push(format!("{name}: module `{module}` is in no layer"));
            continue;
        };
        let text = fs::read_to_string(file).unwrap();
        let code = production_code(&text);
        if climbs_out(file.strip_prefix(&src).unwrap(), &code) {
            wrong.push(format!("{name}: write `crate::…`, not `super::…`, to leave the module"));
        }
        for used in crate_paths(&code) {
            if used != module && !uses.contains(&used.as_str()) {
                wrong.push(format!("{name}: `{module}` may not use `crate::{used}`"));
            }
        }
        if has_word(&code, "unsafe") && !UNSAFE_OK.contains(&module.as_str()) {
            wrong.push(format!("{name}: `unsafe` belongs in {UNSAFE_OK:?}"));
        }
        if has_word(&code, "tokio") && !ASYNC_OK.contains(&module.as_str()) {
            wrong.push(format!("{name}: the async runtime belongs in {ASYNC_OK:?}"));
        }
        let lines = code.lines().count();
        if lines > MAX_LINES {
            wrong.push(format!("{name}: {lines} lines, more than {MAX_LINES}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

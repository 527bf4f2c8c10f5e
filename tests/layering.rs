//! Who may know whom, and where `unsafe` lives.

use std::path::{Path, PathBuf};

fn sources(under: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = vec![];
    let mut folders = vec![root.join(under)];
    while let Some(folder) = folders.pop() {
        if folder.is_file() {
            let text = std::fs::read_to_string(&folder).expect("a source file");
            found.push((folder.strip_prefix(&root).expect("under src").to_owned(), text));
        } else {
            for entry in std::fs::read_dir(&folder).expect("a source folder") {
                folders.push(entry.expect("an entry").path());
            }
        }
    }
    found.retain(|(path, _)| path.extension().is_some_and(|ending| ending == "rs"));
    assert!(!found.is_empty(), "nothing under src/{under}");
    found
}

/// The code of a line: without comments, and without literals (near enough for our sources).
fn code(line: &str) -> String {
    let line = line.split("//").next().unwrap_or_default();
    line.split('"').step_by(2).collect()
}

/// Words of the code, with its line numbers.
fn words(text: &str) -> impl Iterator<Item = (usize, String)> + '_ {
    text.lines().enumerate().flat_map(|(number, line)| {
        code(line)
            .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
            .map(|word| (number + 1, word.to_owned()))
            .collect::<Vec<_>>()
    })
}

fn refuse(under: &str, banned: &[&str], unless: &[&str]) {
    for (path, text) in sources(under) {
        if unless.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        for (line, word) in words(&text) {
            assert!(!banned.contains(&word.as_str()), "src/{}:{line}: {word}", path.display());
        }
    }
}

#[test]
fn unsafe_code_is_at_the_boundary_and_in_the_backends() {
    refuse("", &["unsafe"], &["capi", "cpu", "cuda"]);
}

#[test]
fn the_core_knows_neither_the_boundary_nor_a_backend() {
    for module in ["dispatch", "ops", "problem", "tensor", "error", "workspace"] {
        refuse(&format!("{module}.rs"), &["cpu", "cuda", "capi", "api"], &[]);
    }
}

#[test]
fn the_core_below_does_not_know_what_is_above() {
    let order = ["error", "tensor", "problem", "workspace", "ops", "dispatch"];
    let above = |module: &str| match module {
        "error" => &["tensor", "problem", "workspace", "ops", "dispatch"][..],
        "tensor" => &["problem", "workspace", "ops", "dispatch"],
        "problem" => &["workspace", "ops", "dispatch"],
        "workspace" => &["ops", "dispatch"],
        _ => &[],
    };
    for module in order {
        for (path, text) in sources(&format!("{module}.rs")) {
            for other in above(module) {
                let import = format!("crate::{other}");
                assert!(!text.contains(&import), "{} uses {import}", path.display());
            }
        }
    }
}

#[test]
fn backends_do_not_know_the_boundary_or_each_other() {
    refuse("cpu", &["capi", "cuda", "api", "ffi"], &[]);
    if Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda").exists() {
        // `ffi` there is the standard library's.
        refuse("cuda", &["capi", "cpu", "api"], &[]);
    }
}

#[test]
fn the_boundary_reaches_backends_through_the_api() {
    refuse("capi", &["cpu", "cuda", "dispatch"], &[]);
}

#[test]
fn the_boundary_denies_what_could_panic() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/capi/mod.rs"))
            .expect("src/capi/mod.rs");
    for lint in ["unwrap_used", "expect_used", "panic", "indexing_slicing"] {
        assert!(text.contains(&format!("clippy::{lint}")), "capi does not deny {lint}");
    }
}

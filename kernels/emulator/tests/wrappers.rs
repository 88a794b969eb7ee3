//! The emulator puts meanings of its own in the place of the functions that wrap instructions, so
//! it cannot see what stands in these. Beside each meaning stands the instruction that it is the
//! meaning of; here the two are compared.

use std::path::Path;

const HEADERS: [&str; 7] = ["cluster", "hopper", "memory", "mma", "numbers", "threads", "wgmma"];

/// A function's name and the text from its name to the end of its body, or to its semicolon.
fn functions(text: &str) -> Vec<(String, &str)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = text[from..].find("DEVICE ").map(|i| from + i) {
        let open = at + text[at..].find('(').expect("a function has parameters");
        let name = text[at..open].rsplit([' ', '*']).next().expect("there is a last word");
        let body = open + text[open..].find('{').expect("a function has a body");
        let mut depth = 0;
        let end = text[body..]
            .char_indices()
            .find(|(_, c)| {
                depth += i32::from(*c == '{') - i32::from(*c == '}');
                depth == 0
            })
            .map(|(i, _)| body + i)
            .expect("a body ends");
        let begins_line = text[..at].ends_with('\n') || at == 0;
        if begins_line {
            found.push((name.to_owned(), &text[body + 1..end]));
        }
        from = if begins_line { end } else { at + 1 };
    }
    found
}

/// The instruction of a function: all strings in it and in macros with assembly that it uses, or
/// its text if it has none. White space does not count.
fn instruction(body: &str, header: &str) -> String {
    let mut text = body.to_owned();
    for definition in header.split("\n#define ").skip(1) {
        let name = definition.split(['(', ' ']).next().expect("a macro has a name");
        let length = definition.lines().take_while(|l| l.ends_with('\\')).count() + 1;
        let definition: Vec<&str> = definition.lines().take(length).collect();
        let definition = definition.join("\n");
        if body.contains(name) && definition.contains("asm") && !body.contains(&definition) {
            text.push_str(&definition);
        }
    }
    let constraint = |s: &&str| *s == "memory" || s.trim_start_matches(['=', '+']).len() == 1;
    let strings = text.split('"').skip(1).step_by(2).filter(|s| !constraint(s));
    let strings: String = strings.collect();
    let what = if strings.is_empty() { body.to_owned() } else { strings };
    without_space(&what.replace("\\n", ""))
}

fn without_space(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

/// What the comment right above each function says to be its instruction.
fn modelled(text: &str) -> Vec<(String, String)> {
    let mut said = String::new();
    let mut inside = false;
    let mut all = Vec::new();
    for line in text.lines() {
        if let Some(first) = line.strip_prefix("// Instruction: ") {
            (said, inside) = (first.to_owned(), true);
        } else if let (true, Some(more)) = (inside, line.strip_prefix("//   ")) {
            said.push_str(more);
        } else {
            inside = false;
        }
        if line.starts_with("DEVICE ") && !said.is_empty() {
            let open = line.find('(').expect("a function has parameters");
            let name = line[..open].rsplit([' ', '*']).next().expect("there is a last word");
            all.push((name.to_owned(), without_space(&std::mem::take(&mut said))));
        }
    }
    all
}

/// Where a header and its meanings differ.
fn differences(header: &str, meanings: &str) -> Vec<String> {
    let wrapped = header.split_once("#include \"emulated/").expect("it has meanings").1;
    let mut wrappers = functions(wrapped);
    let modelled = modelled(meanings);
    let mut wrong = Vec::new();
    for (name, said) in &modelled {
        let Some(i) = wrappers.iter().position(|w| w.0 == *name) else {
            wrong.push(format!("{name} is no function of the header"));
            continue;
        };
        let now = instruction(wrappers.remove(i).1, header);
        if now != *said {
            wrong.push(format!("{name} is {now}; what it means was written for {said}"));
        }
    }
    let unsaid = functions(meanings)
        .into_iter()
        .filter(|f| header.contains(&format!(" {}(", f.0)) && !modelled.iter().any(|m| m.0 == f.0));
    wrong.extend(unsaid.map(|f| format!("{} has a meaning, but of which instruction?", f.0)));
    wrong
}

fn read(name: &str) -> (String, String) {
    let emulator = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = |path| std::fs::read_to_string(emulator.join(path)).unwrap();
    (text(format!("../include/{name}.cuh")), text(format!("include/emulated/{name}.h")))
}

#[test]
fn meanings_are_those_of_the_instructions() {
    for name in HEADERS {
        let (header, meanings) = read(name);
        assert_eq!(differences(&header, &meanings), Vec::<String>::new(), "{name}");
        assert!(!modelled(&meanings).is_empty(), "{name}");
    }
}

/// Changes that leave no trace in what the emulator runs.
#[test]
fn a_changed_instruction_is_seen() {
    for (name, from, to, function) in [
        ("hopper", "fence.mbarrier_init.release.cluster;", "", "fence_mbarrier_init"),
        ("hopper", "fence.proxy.async.shared::cta;", "", "fence_proxy_async"),
        ("hopper", "try_wait.parity", "test_wait.parity", "mbarrier_wait_parity"),
        ("threads", "{ __threadfence(); }", "{}", "device_fence"),
        ("threads", "red.release.gpu", "red.relaxed.gpu", "release_increment"),
        ("threads", "ld.acquire.gpu.global", "ld.weak.global", "wait_for_counter"),
        ("threads", "griddepcontrol.wait;", "", "griddep_wait"),
        ("threads", "__syncthreads();", "__syncwarp();", "block_sync"),
        (
            "cluster",
            "barrier.cluster.arrive.release",
            "barrier.cluster.arrive.relaxed",
            "cluster_sync",
        ),
        (
            "cluster",
            "mbarrier.arrive.shared::cluster",
            "mbarrier.arrive.shared::cta",
            "mbarrier_arrive_cluster",
        ),
        ("memory", "cp.async.wait_group", "cp.async.wait_all", "cp_async_wait_group"),
        ("wgmma", "wgmma.fence.sync.aligned;", "", "wgmma_fence"),
        ("wgmma", ", 1, 1, 1, \" trans_a", ", 1, 1, 0, \" trans_a", "wgmma_ss"),
        ("mma", "m16n8k16.row.col", "m16n8k16.row.row", "mma_m16n8k16"),
    ] {
        let (header, meanings) = read(name);
        assert!(header.contains(from), "{name} has no {from:?}");
        let found = differences(&header.replace(from, to), &meanings);
        assert!(found.iter().any(|d| d.starts_with(function)), "{from:?}: {found:?}");
    }
}

//! Makes the Rust side of `kernels/include/abi.h`: its constants, and its structs as `#[repr(C)]`
//! with pointers as `u64`. Understands only what that file consists of, line by line, and reports
//! anything else with its line, so that a struct can never differ between host and device.

use std::collections::HashMap;
use std::fmt::Write;

/// A type of fields or constants.
#[derive(Clone)]
struct Type {
    rust: String,
    size: i64,
    align: i64,
}

#[derive(Default)]
struct Known {
    constants: HashMap<String, i64>,
    structs: HashMap<String, Type>,
}

/// A struct whose end has not been read, or one whose size has not been stated.
#[derive(Default)]
struct Struct {
    docs: String,
    fields: String,
    size: i64,
    align: i64,
}

/// What has been read of a header.
#[derive(Default)]
struct Header {
    known: Known,
    /// The Rust text so far.
    out: String,
    /// The comment that stands above the next line.
    docs: String,
    open: Option<Struct>,
    /// Name and size of the last struct, until its static_assert.
    unchecked: Option<(String, i64)>,
}

/// The Rust text for a header, or what is wrong with which of its lines.
pub fn rust_of(header: &str, file: &str) -> Result<String, String> {
    let mut read = Header::default();
    let mut lines = header.lines().enumerate();
    while let Some((i, first)) = lines.next() {
        let mut line = first.trim().to_owned();
        // the formatter puts long values on a line of their own
        while line.ends_with('=') {
            let Some((_, next)) = lines.next() else { break };
            line = format!("{line} {}", next.trim());
        }
        read.line(&line).map_err(|what| format!("{file}:{}: {what}: {line}", i + 1))?;
    }
    if read.open.is_some() || read.unchecked.is_some() {
        return Err(format!(
            "{file}: the last struct does not end, or its static_assert is missing"
        ));
    }
    Ok(read.out)
}

impl Header {
    fn line(&mut self, line: &str) -> Result<(), String> {
        if let Some((name, size)) = self.unchecked.take() {
            return self.check(line, &name, size);
        }
        if let Some(text) = line.strip_prefix("//") {
            self.docs.push_str(&format!("///{text}\n"));
            return Ok(());
        }
        let docs = std::mem::take(&mut self.docs);
        if line.is_empty() || line == "#pragma once" || line == "#include <stdint.h>" {
            return Ok(()); // the comment is about the file, or what follows in general
        }
        if line == "typedef struct {" && self.open.is_none() {
            self.open = Some(Struct { docs, align: 1, ..Struct::default() });
            return Ok(());
        }
        if let Some(name) = line.strip_prefix("} ").and_then(|l| l.strip_suffix(';')) {
            return self.end(name);
        }
        let Some(open) = &mut self.open else {
            let (name, rust, value) = constant(line, &self.known)?;
            writeln!(self.out, "{docs}pub const {name}: {rust} = {value};")
                .expect("a string takes all");
            let before = self.known.constants.insert(name, value);
            return if before.is_none() { Ok(()) } else { Err("expected a new name".to_owned()) };
        };
        let (name, t) = field(line, &self.known)?;
        if open.size % t.align != 0 {
            return Err("padding is needed before this field".to_owned());
        }
        (open.size, open.align) = (open.size + t.size, open.align.max(t.align));
        writeln!(open.fields, "{docs}pub {name}: {},", t.rust).expect("a string takes all");
        Ok(())
    }

    /// Ends the open struct.
    fn end(&mut self, name: &str) -> Result<(), String> {
        let s = self.open.take().ok_or("no struct ends here")?;
        if !is_name(name) || self.known.structs.contains_key(name) {
            return Err("expected a new name".to_owned());
        }
        if s.size == 0 || s.size % s.align != 0 {
            return Err("the struct is empty or needs padding at its end".to_owned());
        }
        self.out.push_str(&s.docs);
        self.out.push_str("#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]\n");
        writeln!(self.out, "#[repr(C)]\npub struct {name} {{\n{}}}", s.fields)
            .expect("a string takes all");
        let t = Type { rust: name.to_owned(), size: s.size, align: s.align };
        self.known.structs.insert(name.to_owned(), t);
        self.unchecked = Some((name.to_owned(), s.size));
        Ok(())
    }

    /// Compares the size that is stated of the struct above with what its fields add up to.
    fn check(&mut self, line: &str, name: &str, size: i64) -> Result<(), String> {
        if !line.starts_with("static_assert") {
            return Err("expected the static_assert of the struct above".to_owned());
        }
        if line != format!("static_assert(sizeof({name}) == {size});") {
            return Err(format!("expected static_assert(sizeof({name}) == {size});"));
        }
        writeln!(self.out, "const _: () = assert!(size_of::<{name}>() == {size});\n")
            .expect("a string takes all");
        Ok(())
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A field's name and type: `const float* bias;`, `uint32_t count;` or `Layer layers[4];`.
fn field(line: &str, known: &Known) -> Result<(String, Type), String> {
    let line = line.strip_suffix(';').ok_or("expected ;")?;
    let line = line.strip_prefix("const ").unwrap_or(line);
    let (kind, name) = line.split_once(' ').ok_or("expected a type and a name")?;
    let scalar = |rust: &str, size| Type { rust: rust.to_owned(), size, align: size };
    let value = |kind: &str| match kind {
        "uint32_t" => Some(scalar("u32", 4)),
        "uint64_t" => Some(scalar("u64", 8)),
        "float" => Some(scalar("f32", 4)),
        "double" => Some(scalar("f64", 8)),
        _ => known.structs.get(kind).cloned(),
    };
    let mut t = match kind.strip_suffix('*') {
        Some(to) if to == "void" || value(to).is_some() => scalar("u64", 8),
        _ => value(kind).ok_or_else(|| format!("unknown type {kind}"))?,
    };
    let mut name = name;
    if let Some((before, count)) = name.strip_suffix(']').and_then(|n| n.split_once('[')) {
        let count = evaluate(count, known)?;
        if count < 1 {
            return Err("an array needs elements".to_owned());
        }
        (t.rust, t.size, name) = (format!("[{}; {count}]", t.rust), t.size * count, before);
    }
    if !is_name(name) { Err(format!("{name} is no name")) } else { Ok((name.to_owned(), t)) }
}

/// A constant's name, Rust type and value: `constexpr int BLOCK = 4 * 4;`.
fn constant(line: &str, known: &Known) -> Result<(String, &'static str, i64), String> {
    let rest = line.strip_prefix("constexpr ").ok_or("expected a constant or a struct")?;
    let rest = rest.strip_suffix(';').ok_or("expected ;")?;
    let (head, value) = rest.split_once(" = ").ok_or("expected a value")?;
    let (kind, name) = head.split_once(' ').ok_or("expected a type and a name")?;
    let (rust, limit) = match kind {
        "int" => ("usize", i32::MAX as i64),
        "uint32_t" => ("u32", u32::MAX as i64),
        _ => return Err(format!("unknown type {kind}")),
    };
    let value = evaluate(value, known)?;
    if !is_name(name) || !(0..=limit).contains(&value) {
        return Err("expected a name and a value of its type".to_owned());
    }
    Ok((name.to_owned(), rust, value))
}

/// The value of an expression of numbers, names, `sizeof(struct)`, `+`, `-`, `*`, `/` and brackets.
fn evaluate(text: &str, known: &Known) -> Result<i64, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim();
    while let Some(c) = rest.chars().next() {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let len =
            if word(c) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { c.len_utf8() };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    let mut tokens = tokens.as_slice();
    let value = sum(&mut tokens, known)?;
    if tokens.is_empty() { Ok(value) } else { Err(format!("unexpected {}", tokens[0])) }
}

fn sum(tokens: &mut &[&str], known: &Known) -> Result<i64, String> {
    let mut value = product(tokens, known)?;
    while let Some(&operator @ ("+" | "-")) = tokens.first() {
        *tokens = &tokens[1..];
        let right = product(tokens, known)?;
        let result =
            if operator == "+" { value.checked_add(right) } else { value.checked_sub(right) };
        value = result.ok_or("too large a number")?;
    }
    Ok(value)
}

fn product(tokens: &mut &[&str], known: &Known) -> Result<i64, String> {
    let mut value = factor(tokens, known)?;
    while let Some(&operator @ ("*" | "/")) = tokens.first() {
        *tokens = &tokens[1..];
        let right = factor(tokens, known)?;
        let result =
            if operator == "*" { value.checked_mul(right) } else { value.checked_div(right) };
        value = result.ok_or("too large a number, or a division by zero")?;
    }
    Ok(value)
}

fn factor(tokens: &mut &[&str], known: &Known) -> Result<i64, String> {
    if let ["sizeof", "(", name, ")", rest @ ..] = *tokens {
        *tokens = rest;
        let t = known.structs.get(*name).ok_or_else(|| format!("unknown struct {name}"))?;
        return Ok(t.size);
    }
    let (first, rest) = tokens.split_first().ok_or("expected a value")?;
    *tokens = rest;
    if *first == "(" {
        let value = sum(tokens, known)?;
        let [")", rest @ ..] = *tokens else { return Err("expected )".to_owned()) };
        *tokens = rest;
        return Ok(value);
    }
    let number = match first.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None => first.parse(),
    };
    number.ok().or_else(|| known.constants.get(*first).copied()).ok_or(format!("unknown {first}"))
}

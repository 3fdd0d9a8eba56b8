//! Rust source with comments and literals blanked, so that a line scanner sees only code.

use std::collections::BTreeSet;
use std::ops::Range;

/// The code of `source`: same length, same lines, spaces where comments and literals were.
pub(super) fn code(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = String::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let inside_word = at > 0 && is_word(bytes[at - 1]);
        let opaque = opaque_length(&bytes[at..], inside_word);
        for &hidden in &bytes[at..at + opaque] {
            code.push(if hidden == b'\n' { '\n' } else { ' ' });
        }
        if opaque == 0 {
            code.push(if byte.is_ascii() { char::from(byte) } else { '?' });
        }
        at += opaque.max(1);
    }
    code
}

/// The number, from 1, of the line that holds byte `at`.
pub(super) fn line_at(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Where `word` stands in `code` as a whole word.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = at.checked_sub(1).and_then(|at| bytes.get(at));
        let after = bytes.get(at + word.len());
        ![before, after].into_iter().flatten().any(|&byte| is_word(byte))
    })
}

/// The item that starts at `start`: up to its closing brace, or to its semicolon.
pub(super) fn item(code: &str, start: usize) -> Range<usize> {
    let mut braces = 0_usize;
    let mut brackets = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(start) {
        match byte {
            b'{' => braces += 1,
            b'}' => {
                braces = braces.saturating_sub(1);
                if braces == 0 {
                    return start..at + 1;
                }
            }
            b'(' | b'[' => brackets += 1,
            b')' | b']' => brackets = brackets.saturating_sub(1),
            b';' if braces == 0 && brackets == 0 => return start..at + 1,
            _ => {}
        }
    }
    start..code.len()
}

/// The lines, from 1, that only tests have.
pub(super) fn test_lines(code: &str) -> BTreeSet<usize> {
    let attribute = "#[cfg(test)]";
    let items = code.match_indices(attribute).flat_map(|(at, _)| {
        let body = item(code, at + attribute.len());
        line_at(code, at)..=line_at(code, body.end)
    });
    items.collect()
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

/// How many bytes the comment or literal at the start of `rest` has; 0 if none starts there.
fn opaque_length(rest: &[u8], inside_word: bool) -> usize {
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'"', ..] => 1 + quoted(&rest[1..], b'"'),
        [b'\'', ..] => character(rest),
        [b'r' | b'b' | b'c', ..] if !inside_word => raw_string(rest),
        _ => 0,
    }
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                at += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    rest.len()
}

/// Up to and with the closing quote.
fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 0;
    while let Some(&byte) = rest.get(at) {
        at += if byte == b'\\' { 2 } else { 1 };
        if byte == quote {
            return at;
        }
    }
    rest.len()
}

/// A character literal, or nothing if the quote starts a lifetime.
fn character(rest: &[u8]) -> usize {
    let after = &rest[1..];
    if after.first() == Some(&b'\\') {
        return 1 + quoted(after, b'\'');
    }
    let continuation = |&&byte: &&u8| byte & 0b1100_0000 == 0b1000_0000;
    let width = 1 + after.iter().skip(1).take_while(continuation).count();
    if after.get(width) == Some(&b'\'') { width + 2 } else { 0 }
}

/// `r"…"`, `br#"…"#` and their like; 0 for a word that only starts with these letters.
fn raw_string(rest: &[u8]) -> usize {
    let prefix = usize::from(matches!(rest[0], b'b' | b'c'));
    if rest.get(prefix) != Some(&b'r') {
        return 0;
    }
    let hashes = rest[prefix + 1..].iter().take_while(|&&byte| byte == b'#').count();
    let open = prefix + 1 + hashes;
    if rest.get(open) != Some(&b'"') {
        return 0;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    let body = &rest[open + 1..];
    let end = body.windows(close.len()).position(|window| window == close);
    end.map_or(rest.len(), |end| open + 1 + end + close.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible(source: &str) -> String {
        let code = code(source);
        assert_eq!(code.len(), source.len());
        code.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_strings_are_blanked() {
        assert_eq!(visible("a(); // unsafe { }\nb();"), "a(); b();");
        assert_eq!(visible("a /* x /* y */ z */ b"), "a b");
        assert_eq!(visible(r#"f("unsafe \" { ", b"}", c"{")"#), "f( , b , c )");
        assert_eq!(visible("r\"}\" + br#\"\"}\"# + r#type"), "+ + r#type");
        assert_eq!(visible("\"ünsafe\" x"), "x");
    }

    #[test]
    fn characters_are_blanked_and_lifetimes_stay() {
        assert_eq!(visible("fn f<'a>(c: &'a u8) { '{'; '\\''; '\"'; 'ü'; b'}' }"), {
            "fn f<'a>(c: &'a u8) { ; ; ; ; b }"
        });
    }

    #[test]
    fn what_never_closes_is_blanked_to_the_end() {
        for source in ["x \"never", "x /* never", "x r#\"never\"", "x '\\", "x \"\\"] {
            assert_eq!(visible(source), "x");
        }
    }

    #[test]
    fn an_item_ends_at_its_brace_or_semicolon() {
        let code = "fn f(x: [u8; 4]) { { } } fn g();";
        assert_eq!(&code[item(code, 0)], "fn f(x: [u8; 4]) { { } }");
        assert_eq!(&code[item(code, 25)], "fn g();");
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(words("unsafe_code unsafe un unsafe", "unsafe").collect::<Vec<_>>(), [12, 22]);
    }

    #[test]
    fn modules_for_tests_are_known_by_their_lines() {
        let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() {}\n}\nfn c() {}\n";
        assert_eq!(test_lines(&code(source)), BTreeSet::from([2, 3, 4, 5]));
    }
}

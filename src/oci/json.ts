/**
 * JSON whose integers keep every digit.
 *
 * An OCI spec holds 64-bit integers: RLIM_INFINITY is 18446744073709551615, an unlimited memory limit often
 * 9223372036854771712. As JavaScript numbers they would come out rounded, and crun refuses the rounded one as out of
 * range. So an integer beyond 2^53 is a bigint here.
 *
 * Members that are null are left out: for the Go structs that define the spec, null and absent are the same.
 */

/** An integer of a spec; a bigint only beyond Number.MAX_SAFE_INTEGER. */
export type Integer = number | bigint;

/** ECMA-262 "JSON.parse source text access", in V8 since Node 21; TypeScript's library does not know it yet. */
type SourceReviver = (this: unknown, key: string, value: unknown, context: { readonly source?: string }) => unknown;
const parseWithSource = JSON.parse as (text: string, reviver: SourceReviver) => unknown;
const { rawJSON } = JSON as unknown as { rawJSON(text: string): unknown };

/** @throws SyntaxError when the text is not JSON, RangeError when it is nested too deeply. */
export function parseJson(text: string): unknown {
  return parseWithSource(text, function (_key, value, { source }) {
    if (value === null) return Array.isArray(this) ? null : undefined;
    if (typeof value !== 'number' || Number.isSafeInteger(value)) return value;
    return source !== undefined && /^-?\d+$/.test(source) ? BigInt(source) : value;
  });
}

/** The inverse of `parseJson`. */
export function stringifyJson(value: unknown): string {
  return JSON.stringify(value, (_key, member: unknown) => {
    return typeof member === 'bigint' ? rawJSON(member.toString()) : member;
  });
}

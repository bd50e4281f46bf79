/**
 * Bundles one entry into one file for the pinned Node: `bundle.ts ENTRY OUT`. The ending of OUT chooses the module
 * format (.mjs, .cjs).
 *
 * koffi looks for its native half in many places by its own package's layout. In a bundle there is one place: the file
 * `koffi.node` beside it.
 */
import { resolve } from 'node:path';
import { build, type Plugin } from 'esbuild';

const koffiBesideBundle: Plugin = {
  name: 'koffi-beside-bundle',
  setup(pluginBuild) {
    pluginBuild.onResolve({ filter: /^koffi$/ }, () => ({ path: 'koffi', namespace: 'koffi-beside-bundle' }));
    pluginBuild.onLoad({ filter: /.*/, namespace: 'koffi-beside-bundle' }, () => ({
      contents: "module.exports = require('./koffi.node');",
      loader: 'js',
    }));
    // Left as it is: Node resolves it from the bundle's own folder.
    pluginBuild.onResolve({ filter: /^\.\/koffi\.node$/ }, () => ({ path: './koffi.node', external: true }));
  },
};

/** The agent is a server only; without grpc-js's client it starts sooner. */
const grpcServerOnly: Plugin = {
  name: 'grpc-server-only',
  setup(pluginBuild) {
    pluginBuild.onResolve({ filter: /^@grpc\/grpc-js$/ }, () => ({ path: resolve('agent/grpc-server-only.ts') }));
  },
};

const [entry, out] = process.argv.slice(2);
if (entry === undefined || out === undefined) throw new Error('usage: bundle.ts ENTRY OUT.mjs|OUT.cjs');
const isAgent = entry.startsWith('agent/');
const format = out.endsWith('.cjs') ? 'cjs' : 'esm';
await build({
  entryPoints: [entry],
  outfile: out,
  bundle: true,
  platform: 'node',
  target: 'node24',
  format,
  // Shorter to read and parse at every start; names stay, so that a stack trace can be read.
  minifySyntax: true,
  minifyWhitespace: true,
  legalComments: 'none',
  minifyIdentifiers: isAgent,
  external: isAgent ? ['@grpc/proto-loader'] : [],
  plugins: [koffiBesideBundle, ...(isAgent ? [grpcServerOnly] : [])],
  ...(format === 'esm'
    ? // Packages that are CommonJS inside require Node's own modules.
      { banner: { js: "import{createRequire}from'node:module';const require=createRequire(import.meta.url);" } }
    : { define: { 'import.meta.dirname': '__dirname', 'import.meta.filename': '__filename' } }),
  logLevel: 'warning',
}).catch(() => {
  // esbuild has already said what is wrong, better than a stack trace would.
  process.exitCode = 1;
});

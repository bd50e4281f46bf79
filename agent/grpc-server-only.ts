/**
 * What the agent's bundle gets for `@grpc/grpc-js`: the server, without the client (resolvers, load balancers, retries),
 * which would be a third of the bundle. The generated code names the client's parts, too, but the agent never makes a
 * client.
 */
export { Server } from '@grpc/grpc-js/build/src/server.js';
export { ServerCredentials } from '@grpc/grpc-js/build/src/server-credentials.js';

export class Client {}

export function makeGenericClientConstructor(): typeof Client {
  return Client;
}

//go:build tools

// Names the command, so that go.mod and go.sum pin what it is built from. It is never compiled.
package tools

import _ "github.com/pulumi/pulumi/sdk/v3/nodejs/cmd/pulumi-language-nodejs"
